"""A tiny random Llama 3.2 Vision checkpoint: a cross-attention layer between two others, tiles of 56 pixels.

The gates of cross-attention, which start at 0 in a fresh model and would hide the images, are 1 here: the noise that
fills tiny models sets every vector of scales to ones.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.support.tiny_family import TinyFamily, names
from tests.support.tiny_tokenizers import MAX_LENGTH_TOKENS, NUM_ORDINARY, tokenizer_with

# The last one is the image token: its id is the size of the vocabulary, one past the head's last output.
SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|finetune_right_pad_id|>", "<|image|>",
)  # fmt: skip
VOCAB_SIZE = NUM_ORDINARY + len(SPECIAL_TOKENS) - 1
TILE_SIZE = 56
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<|image|>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
IMAGE_PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "MllamaImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_image_tiles": 4,
    "processor_class": "MllamaProcessor",
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": TILE_SIZE, "width": TILE_SIZE},
}


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The tokenizer, with the chat template."""
    return tokenizer_with(
        SPECIAL_TOKENS,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        chat_template=CHAT_TEMPLATE,
    )


def build(tie: bool) -> Any:
    """Three language layers, the second of them with cross-attention; two local vision layers and a global one."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    assert not tie, "embeddings and head of this family differ in size"
    convert = tokenizer().convert_tokens_to_ids
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_LENGTH_TOKENS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": convert("<|begin_of_text|>"),
        "eos_token_id": convert("<|eot_id|>"),
        "pad_token_id": convert("<|finetune_right_pad_id|>"),
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": TILE_SIZE,
        "patch_size": 14,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 128,
    }
    return MllamaForConditionalGeneration(
        MllamaConfig(text_config=text, vision_config=vision, image_token_index=convert("<|image|>"))
    )


def write(model: Any, directory: Path) -> None:
    """Writes a checkpoint folder laid out like those on the Hub."""
    from transformers import GenerationConfig

    convert = tokenizer().convert_tokens_to_ids
    model.generation_config = GenerationConfig(
        bos_token_id=convert("<|begin_of_text|>"),
        eos_token_id=[convert("<|end_of_text|>"), convert("<|eot_id|>")],
        pad_token_id=convert("<|finetune_right_pad_id|>"),
    )
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    text = json.dumps(IMAGE_PROCESSOR, indent=2, sort_keys=True)
    (directory / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


def stock_processor(folder: Path) -> Any:
    """`MllamaProcessor` over the Pillow image processor."""
    from transformers import AutoTokenizer, MllamaImageProcessorPil, MllamaProcessor

    return MllamaProcessor(
        MllamaImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
    )


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLLAMA = TinyFamily(
    build=build,
    write=write,
    processor_class="MllamaProcessor",
    stock_processor=stock_processor,
    answer_start="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end_of_turn="<|eot_id|>",
    pad_token="<|finetune_right_pad_id|>",
    image_tokens=("<|image|>",),
    language_attention=(
        *(f"model.language_model.layers.0.self_attn.{name}" for name in _ATTENTION),
        *(f"model.language_model.layers.1.cross_attn.{name}" for name in _ATTENTION),
        *(f"model.language_model.layers.2.self_attn.{name}" for name in _ATTENTION),
    ),
    language_mlp=names("model.language_model.layers.{}.mlp.", 3, ("gate_proj", "up_proj", "down_proj")),
    vision_attention=(
        *names("model.vision_model.transformer.layers.{}.self_attn.", 2, _ATTENTION),
        *names("model.vision_model.global_transformer.layers.{}.self_attn.", 1, _ATTENTION),
    ),
    vision_mlp=(
        *names("model.vision_model.transformer.layers.{}.mlp.", 2, ("fc1", "fc2")),
        *names("model.vision_model.global_transformer.layers.{}.mlp.", 1, ("fc1", "fc2")),
    ),
    projector=("model.multi_modal_projector",),
    language_layers=names("model.language_model.layers.{}", 3, ("",)),
    vision_layers=(
        *names("model.vision_model.transformer.layers.{}", 2, ("",)),
        "model.vision_model.global_transformer.layers.0",
    ),
    images_by_row=True,
)
