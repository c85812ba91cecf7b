"""A tiny random Qwen3-VL checkpoint, in which the first of two vision layers has a merger of its own."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.stock_processors import without_video
from tests.support.tiny_family import TinyFamily, names
from vlm.builtin.model import language_config, media_config, token_config, write_checkpoint

_PROCESSOR = "Qwen3VLProcessor"
# Unlike its predecessors, the model sees pixels from -1 to 1. Real patches have 16 pixels; 14 suit the tests' images.
_IMAGE_PROCESSOR = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": _PROCESSOR,
}


def build(tie: bool) -> Any:
    """A model over the built-in tokenizer, with positions of a 6 x 6 grid for all image sizes."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    language = language_config(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2)
    # Frequencies of time, height and width take turns here, where they stand in blocks in the models before.
    language["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": [6, 5, 5]}
    vision = {
        "depth": 2,
        "deepstack_visual_indexes": [0],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "num_position_embeddings": 36,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    text = {**language, **token_config(), "head_dim": 32}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie, **media_config())
    )


def write(model: Any, directory: Path) -> None:
    """Writes a checkpoint folder laid out like those on the Hub."""
    write_checkpoint(model, directory, processor_class=_PROCESSOR)
    path = directory / "preprocessor_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | _IMAGE_PROCESSOR
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


QWEN3_VL = TinyFamily(
    build=build,
    write=write,
    processor_class=_PROCESSOR,
    stock_processor=partial(without_video, _PROCESSOR, "Qwen2VLImageProcessorPil"),
    answer_start="<|im_start|>assistant\n",
    end_of_turn="<|im_end|>",
    pad_token="<|endoftext|>",
    image_tokens=("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    language_layers=names("model.language_model.layers.{}", 2, ("",)),
    vision_layers=names("model.visual.blocks.{}", 2, ("",)),
    language_attention=names("model.language_model.layers.{}.self_attn.", 2, ("q_proj", "k_proj", "v_proj", "o_proj")),
    language_mlp=names("model.language_model.layers.{}.mlp.", 2, ("gate_proj", "up_proj", "down_proj")),
    vision_attention=names("model.visual.blocks.{}.attn.", 2, ("qkv", "proj")),
    vision_mlp=names("model.visual.blocks.{}.mlp.", 2, ("linear_fc1", "linear_fc2")),
    projector=(
        "model.visual.merger.linear_fc1",
        "model.visual.merger.linear_fc2",
        "model.visual.deepstack_merger_list.0.linear_fc1",
        "model.visual.deepstack_merger_list.0.linear_fc2",
    ),
)
