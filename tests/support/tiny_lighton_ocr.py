"""A tiny random LightOnOCR checkpoint."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.support.tiny_family import TinyFamily, names
from tests.support.tiny_tokenizers import MAX_LENGTH_TOKENS, NUM_ORDINARY, tokenizer_with

IMAGE, BREAK, END_OF_IMAGE = "<|image_pad|>", "<|vision_pad|>", "<|vision_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE, BREAK, END_OF_IMAGE)
PATCH_SIZE = 14
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}{{- '<|image_pad|>' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
IMAGE_PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "PixtralImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 2 * PATCH_SIZE,
    "processor_class": "LightOnOcrProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 336},
}
PROCESSOR = {"patch_size": PATCH_SIZE, "processor_class": "LightOnOcrProcessor", "spatial_merge_size": 2}


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The tokenizer, with the chat template."""
    return tokenizer_with(SPECIAL_TOKENS, bos=None, eos="<|im_end|>", pad="<|endoftext|>", chat_template=CHAT_TEMPLATE)


def build(tie: bool) -> Any:
    """A model over the tokens of `tokenizer`; its heads together are wider than the residual stream, as in Qwen3."""
    from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration

    convert = tokenizer().convert_tokens_to_ids
    text = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": NUM_ORDINARY + len(SPECIAL_TOKENS),
        "max_position_embeddings": MAX_LENGTH_TOKENS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "eos_token_id": convert("<|im_end|>"),
        "pad_token_id": convert("<|endoftext|>"),
        "tie_word_embeddings": tie,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": PATCH_SIZE,
        "image_size": 448,
    }
    return LightOnOcrForConditionalGeneration(
        LightOnOcrConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=convert(IMAGE),
            spatial_merge_size=2,
            tie_word_embeddings=tie,
        )
    )


def write(model: Any, directory: Path) -> None:
    """Writes a checkpoint folder laid out like those on the Hub."""
    from transformers import GenerationConfig

    convert = tokenizer().convert_tokens_to_ids
    model.generation_config = GenerationConfig(
        eos_token_id=[convert("<|im_end|>"), convert("<|endoftext|>")], pad_token_id=convert("<|endoftext|>")
    )
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    image_tokens = {"image_token": IMAGE, "image_break_token": BREAK, "image_end_token": END_OF_IMAGE}
    tokenizer_config = {**json.loads(path.read_text(encoding="utf-8")), **image_tokens}
    for file, content in (
        ("tokenizer_config.json", tokenizer_config),
        ("preprocessor_config.json", IMAGE_PROCESSOR),
        ("processor_config.json", PROCESSOR),
    ):
        (directory / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def stock_processor(folder: Path) -> Any:
    """`LightOnOcrProcessor` over the Pillow image processor."""
    from transformers import AutoTokenizer, LightOnOcrProcessor, PixtralImageProcessorPil

    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    return LightOnOcrProcessor(
        PixtralImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        patch_size=settings["patch_size"],
        spatial_merge_size=settings["spatial_merge_size"],
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
    )


_VISION_LAYER = "model.vision_encoder.transformer.layers.{}"
LIGHTON_OCR = TinyFamily(
    build=build,
    write=write,
    processor_class="LightOnOcrProcessor",
    stock_processor=stock_processor,
    answer_start="<|im_start|>assistant\n",
    end_of_turn="<|im_end|>",
    pad_token="<|endoftext|>",
    image_tokens=(IMAGE, BREAK, END_OF_IMAGE),
    language_attention=names("model.language_model.layers.{}.self_attn.", 2, ("q_proj", "k_proj", "v_proj", "o_proj")),
    language_mlp=names("model.language_model.layers.{}.mlp.", 2, ("gate_proj", "up_proj", "down_proj")),
    vision_attention=names(_VISION_LAYER + ".attention.", 2, ("q_proj", "k_proj", "v_proj", "o_proj")),
    vision_mlp=names(_VISION_LAYER + ".feed_forward.", 2, ("gate_proj", "up_proj", "down_proj")),
    projector=(
        "model.vision_projection.patch_merger.merging_layer",
        "model.vision_projection.linear_1",
        "model.vision_projection.linear_2",
    ),
    language_layers=names("model.language_model.layers.{}", 2, ("",)),
    vision_layers=names(_VISION_LAYER, 2, ("",)),
)
