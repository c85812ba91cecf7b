"""A tiny random PaddleOCR-VL checkpoint."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.support.tiny_family import TinyFamily, names
from tests.support.tiny_tokenizers import MAX_LENGTH_TOKENS, NUM_ORDINARY, tokenizer_with

BEGIN, END, PAD, IMAGE = "<|begin_of_sentence|>", "</s>", "<unk>", "<|IMAGE_PLACEHOLDER|>"
SPECIAL_TOKENS = (PAD, "<s>", END, BEGIN, IMAGE, "<|IMAGE_START|>", "<|IMAGE_END|>", "<|video_pad|>")
# A user's images come before the words; nothing but the end token stands behind an answer.
CHAT_TEMPLATE = """\
{%- macro words(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content if part['type'] == 'image' -%}{{- '<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' -}}{%- endfor -%}
{%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- '<|begin_of_sentence|>' -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- words(message['content']) + '\\n' -}}
{%- elif message['role'] == 'user' -%}
{{- 'User: ' + words(message['content']) + '\\n' -}}
{%- else -%}
{{- 'Assistant:\\n' + words(message['content']) + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}
"""
IMAGE_PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "PaddleOCRVLImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    # Limits on the area as published checkpoints write them.
    "max_pixels": 256 * 28 * 28,
    "merge_size": 2,
    "min_pixels": 4 * 28 * 28,
    "patch_size": 14,
    "processor_class": "PaddleOCRVLProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "temporal_patch_size": 1,
}


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The tokenizer, with the chat template; it puts nothing before a text by itself."""
    return tokenizer_with(SPECIAL_TOKENS, bos=None, eos=END, pad=PAD, chat_template=CHAT_TEMPLATE)


def build(tie: bool) -> Any:
    """A model whose rotary positions have frequencies for time, height and width in the ratio 2 : 3 : 3."""
    from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

    convert = tokenizer().convert_tokens_to_ids
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": NUM_ORDINARY + len(SPECIAL_TOKENS),
        "max_position_embeddings": MAX_LENGTH_TOKENS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": convert("<s>"),
        "eos_token_id": convert(END),
        "pad_token_id": convert(PAD),
        "tie_word_embeddings": tie,
    }
    # Learned positions for 4 x 4 patches, so that those of the tests' images lie between them.
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "spatial_merge_size": 2,
    }
    media = {
        "image_token_id": convert(IMAGE),
        "video_token_id": convert("<|video_pad|>"),
        "vision_start_token_id": convert("<|IMAGE_START|>"),
        "vision_end_token_id": convert("<|IMAGE_END|>"),
    }
    return PaddleOCRVLForConditionalGeneration(
        PaddleOCRVLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie, **media)
    )


def write(model: Any, directory: Path) -> None:
    """Writes a checkpoint folder laid out like those on the Hub."""
    from transformers import GenerationConfig

    convert = tokenizer().convert_tokens_to_ids
    model.generation_config = GenerationConfig(
        bos_token_id=convert("<s>"), eos_token_id=[convert(END)], pad_token_id=convert(PAD)
    )
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), "image_token": IMAGE}
    for file, content in (("tokenizer_config.json", config), ("preprocessor_config.json", IMAGE_PROCESSOR)):
        (directory / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def stock_processor(folder: Path) -> Any:
    """`PaddleOCRVLProcessor` over the Pillow image processor."""
    from transformers import AutoTokenizer, PaddleOCRVLImageProcessorPil, PaddleOCRVLProcessor

    return PaddleOCRVLProcessor(
        PaddleOCRVLImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
    )


_VISION_LAYER = "model.visual.vision_model.encoder.layers.{}"
PADDLEOCR_VL = TinyFamily(
    build=build,
    write=write,
    processor_class="PaddleOCRVLProcessor",
    stock_processor=stock_processor,
    answer_start="Assistant:\n",
    end_of_turn=END,
    pad_token=PAD,
    image_tokens=(IMAGE, "<|IMAGE_START|>", "<|IMAGE_END|>"),
    language_attention=names("model.language_model.layers.{}.self_attn.", 2, ("q_proj", "k_proj", "v_proj", "o_proj")),
    language_mlp=names("model.language_model.layers.{}.mlp.", 2, ("gate_proj", "up_proj", "down_proj")),
    vision_attention=names(_VISION_LAYER + ".self_attn.", 2, ("q_proj", "k_proj", "v_proj", "out_proj")),
    vision_mlp=names(_VISION_LAYER + ".mlp.", 2, ("fc1", "fc2")),
    projector=("model.projector.linear_1", "model.projector.linear_2"),
    language_layers=names("model.language_model.layers.{}", 2, ("",)),
    vision_layers=names(_VISION_LAYER, 2, ("",)),
)
