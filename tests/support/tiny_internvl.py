"""A tiny random InternVL checkpoint: up to three tiles of 56 pixels, 4 tokens each."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tests.support.stock_processors import without_video
from tests.support.tiny_family import TinyFamily, names
from tests.support.tiny_tokenizers import MAX_LENGTH_TOKENS, NUM_ORDINARY, tokenizer_with

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<ref>", "</ref>",
    "<box>", "</box>",
)  # fmt: skip
TILE_SIZE = 56
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<IMG_CONTEXT>\\n' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
IMAGE_PROCESSOR = {
    # As published; the processor asks for crops all the same.
    "crop_to_patches": False,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "max_patches": 3,
    "min_patches": 1,
    "processor_class": "InternVLProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": TILE_SIZE, "width": TILE_SIZE},
}
_TOKEN_NAMES = {
    "context_image_token": "<IMG_CONTEXT>",
    "end_image_token": "</img>",
    "start_image_token": "<img>",
    "video_token": "<video>",
}


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The tokenizer, with the chat template."""
    return tokenizer_with(SPECIAL_TOKENS, bos=None, eos="<|im_end|>", pad="<|endoftext|>", chat_template=CHAT_TEMPLATE)


def build(tie: bool) -> Any:
    """A model whose tower has learnt positions for one tile."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    convert = tokenizer().convert_tokens_to_ids
    text = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": NUM_ORDINARY + len(SPECIAL_TOKENS),
        "max_position_embeddings": MAX_LENGTH_TOKENS,
        "eos_token_id": convert("<|im_end|>"),
        "pad_token_id": convert("<|endoftext|>"),
        "tie_word_embeddings": tie,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [TILE_SIZE, TILE_SIZE],
        "patch_size": [14, 14],
        "attention_bias": True,
    }
    return InternVLForConditionalGeneration(
        InternVLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=convert("<IMG_CONTEXT>"),
            image_seq_length=4,
            tie_word_embeddings=tie,
        )
    )


def write(model: Any, directory: Path) -> None:
    """Writes a checkpoint folder laid out like those on the Hub."""
    from transformers import GenerationConfig

    convert = tokenizer().convert_tokens_to_ids
    model.generation_config = GenerationConfig(
        eos_token_id=[convert("<|im_end|>")], pad_token_id=convert("<|endoftext|>")
    )
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"extra_special_tokens": _TOKEN_NAMES}
    processor = {"image_seq_length": 4, "processor_class": "InternVLProcessor"}
    for name, content in (
        ("tokenizer_config.json", settings),
        ("preprocessor_config.json", IMAGE_PROCESSOR),
        ("processor_config.json", processor),
    ):
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


INTERNVL = TinyFamily(
    build=build,
    write=write,
    processor_class="InternVLProcessor",
    stock_processor=partial(without_video, "InternVLProcessor", "GotOcr2ImageProcessorPil", image_seq_length=4),
    answer_start="<|im_start|>assistant\n",
    end_of_turn="<|im_end|>",
    pad_token="<|endoftext|>",
    image_tokens=("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
    language_attention=names("model.language_model.layers.{}.self_attn.", 2, ("q_proj", "k_proj", "v_proj", "o_proj")),
    language_mlp=names("model.language_model.layers.{}.mlp.", 2, ("gate_proj", "up_proj", "down_proj")),
    vision_attention=names(
        "model.vision_tower.encoder.layer.{}.attention.", 2, ("q_proj", "k_proj", "v_proj", "projection_layer")
    ),
    vision_mlp=names("model.vision_tower.encoder.layer.{}.mlp.", 2, ("fc1", "fc2")),
    projector=("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    language_layers=names("model.language_model.layers.{}", 2, ("",)),
    vision_layers=names("model.vision_tower.encoder.layer.{}", 2, ("",)),
    image_options={"crop_to_patches": True},
)
