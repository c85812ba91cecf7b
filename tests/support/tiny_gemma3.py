"""A tiny random Gemma 3 checkpoint: images of 56 pixels and 4 tokens, a layer with a short window and one with full sight."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.support.tiny_family import TinyFamily, names
from tests.support.tiny_tokenizers import MAX_LENGTH_TOKENS, NUM_ORDINARY, tokenizer_with

SPECIAL_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
    "<image_soft_token>",
)  # fmt: skip
IMAGE_SIZE = 56
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<start_of_image>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""
IMAGE_PROCESSOR = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_pan_and_scan": None,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Gemma3ImageProcessor",
    "image_seq_length": 4,
    "image_std": [0.5, 0.5, 0.5],
    "pan_and_scan_max_num_crops": None,
    "pan_and_scan_min_crop_size": None,
    "pan_and_scan_min_ratio_to_activate": None,
    "processor_class": "Gemma3Processor",
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
}
_TOKEN_NAMES = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The tokenizer, with the chat template."""
    return tokenizer_with(SPECIAL_TOKENS, bos="<bos>", eos="<eos>", pad="<pad>", chat_template=CHAT_TEMPLATE)


def build(tie: bool) -> Any:
    """A model whose first layer's window is shorter than the tests' sequences."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    convert = tokenizer().convert_tokens_to_ids
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "vocab_size": NUM_ORDINARY + len(SPECIAL_TOKENS),
        "max_position_embeddings": MAX_LENGTH_TOKENS,
        "bos_token_id": convert("<bos>"),
        "eos_token_id": convert("<eos>"),
        "pad_token_id": convert("<pad>"),
        "tie_word_embeddings": tie,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            boi_token_index=convert("<start_of_image>"),
            eoi_token_index=convert("<end_of_image>"),
            image_token_index=convert("<image_soft_token>"),
            tie_word_embeddings=tie,
        )
    )


def write(model: Any, directory: Path) -> None:
    """Writes a checkpoint folder laid out like those on the Hub."""
    import torch
    from transformers import GenerationConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Gemma3RMSNorm):
                module.weight.zero_()  # it counts from 1
        # The model multiplies them by this; they would drown what its layers add.
        model.get_input_embeddings().weight /= model.config.text_config.hidden_size**0.5
    convert = tokenizer().convert_tokens_to_ids
    model.generation_config = GenerationConfig(
        bos_token_id=convert("<bos>"),
        eos_token_id=[convert("<eos>"), convert("<end_of_turn>")],
        pad_token_id=convert("<pad>"),
    )
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"extra_special_tokens": _TOKEN_NAMES}
    processor = {"image_seq_length": 4, "processor_class": "Gemma3Processor"}
    for name, content in (
        ("tokenizer_config.json", settings),
        ("preprocessor_config.json", IMAGE_PROCESSOR),
        ("processor_config.json", processor),
    ):
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def stock_processor(folder: Path) -> Any:
    """`Gemma3Processor` over the Pillow image processor."""
    from transformers import AutoTokenizer, Gemma3ImageProcessorPil, Gemma3Processor

    return Gemma3Processor(
        Gemma3ImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        image_seq_length=4,
    )


GEMMA3 = TinyFamily(
    build=build,
    write=write,
    processor_class="Gemma3Processor",
    stock_processor=stock_processor,
    answer_start="<start_of_turn>model\n",
    end_of_turn="<end_of_turn>",
    pad_token="<pad>",
    image_tokens=("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
    language_attention=names("model.language_model.layers.{}.self_attn.", 2, ("q_proj", "k_proj", "v_proj", "o_proj")),
    language_mlp=names("model.language_model.layers.{}.mlp.", 2, ("gate_proj", "up_proj", "down_proj")),
    vision_attention=names(
        "model.vision_tower.encoder.layers.{}.self_attn.", 2, ("q_proj", "k_proj", "v_proj", "out_proj")
    ),
    vision_mlp=names("model.vision_tower.encoder.layers.{}.mlp.", 2, ("fc1", "fc2")),
    projector=(),
    language_layers=names("model.language_model.layers.{}", 2, ("",)),
    vision_layers=names("model.vision_tower.encoder.layers.{}", 2, ("",)),
    images_by_row=True,
)
