"""A tiny random GLM-OCR checkpoint."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tests.support.stock_processors import without_video
from tests.support.tiny_family import TinyFamily, names
from tests.support.tiny_tokenizers import MAX_LENGTH_TOKENS, NUM_ORDINARY, tokenizer_with

SPECIAL_TOKENS = (
    "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|begin_of_image|>",
    "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>",
)  # fmt: skip
# A turn begins with its role. Nothing ends one: the model says that it is done by writing the user's role.
CHAT_TEMPLATE = """\
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<|begin_of_image|><|image|><|end_of_image|>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- endif -%}
"""
IMAGE_PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Glm46VImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "merge_size": 2,
    "patch_size": 14,
    "processor_class": "Glm46VProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 2 * 256 * 28 * 28, "shortest_edge": 2 * 4 * 28 * 28},
    "temporal_patch_size": 2,
}


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The tokenizer, with the chat template; it has no token before a text but what the template writes."""
    return tokenizer_with(
        SPECIAL_TOKENS, bos=None, eos="<|endoftext|>", pad="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def build(tie: bool) -> Any:
    """A model whose rotary positions have frequencies for time, height and width in the ratio 2 : 3 : 3."""
    from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

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
        "eos_token_id": [convert("<|endoftext|>"), convert("<|user|>")],
        "pad_token_id": convert("<|endoftext|>"),
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    media = {
        f"{name}_token_id": convert(token)
        for name, token in (
            ("image", "<|image|>"),
            ("video", "<|video|>"),
            ("image_start", "<|begin_of_image|>"),
            ("image_end", "<|end_of_image|>"),
            ("video_start", "<|begin_of_video|>"),
            ("video_end", "<|end_of_video|>"),
        )
    }
    return GlmOcrForConditionalGeneration(
        GlmOcrConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie, **media)
    )


def write(model: Any, directory: Path) -> None:
    """Writes a checkpoint folder laid out like those on the Hub."""
    from transformers import GenerationConfig

    convert = tokenizer().convert_tokens_to_ids
    model.generation_config = GenerationConfig(
        eos_token_id=[convert("<|endoftext|>"), convert("<|user|>")], pad_token_id=convert("<|endoftext|>")
    )
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    text = json.dumps(IMAGE_PROCESSOR, indent=2, sort_keys=True)
    (directory / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


GLM_OCR = TinyFamily(
    build=build,
    write=write,
    processor_class="Glm46VProcessor",
    stock_processor=partial(without_video, "Glm46VProcessor", "Glm46VImageProcessorPil"),
    answer_start="<|assistant|>\n",
    end_of_turn="<|user|>",
    pad_token="<|endoftext|>",
    image_tokens=(
        "<|image|>",
        "<|video|>",
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
    ),
    language_layers=names("model.language_model.layers.{}", 2, ("",)),
    vision_layers=names("model.visual.blocks.{}", 2, ("",)),
    language_attention=names("model.language_model.layers.{}.self_attn.", 2, ("q_proj", "k_proj", "v_proj", "o_proj")),
    language_mlp=names("model.language_model.layers.{}.mlp.", 2, ("gate_up_proj", "down_proj")),
    vision_attention=names("model.visual.blocks.{}.attn.", 2, ("qkv", "proj")),
    vision_mlp=names("model.visual.blocks.{}.mlp.", 2, ("gate_proj", "up_proj", "down_proj")),
    projector=(
        "model.visual.merger.proj",
        "model.visual.merger.gate_proj",
        "model.visual.merger.up_proj",
        "model.visual.merger.down_proj",
    ),
    missing_end="<|user|>",
)
