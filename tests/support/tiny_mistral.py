"""Tiny random checkpoints of Pixtral, and of Mistral 3, whose projector merges 2 x 2 patches into one token."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tests.support.tiny_family import TinyFamily, names
from tests.support.tiny_tokenizers import MAX_LENGTH_TOKENS, NUM_ORDINARY, tokenizer_with

SPECIAL_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]",
)  # fmt: skip
VOCAB_SIZE = NUM_ORDINARY + len(SPECIAL_TOKENS)
PATCH_SIZE = 14
# Users' turns stand between marks, an answer follows them bare and ends with a token; nothing opens an answer.
CHAT_TEMPLATE = """\
{%- macro words(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content -%}{{- '[IMG]' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- '[SYSTEM_PROMPT]' + words(message['content']) + '[/SYSTEM_PROMPT]' -}}
{%- elif message['role'] == 'user' -%}
{{- '[INST]' + words(message['content']) + '[/INST]' -}}
{%- else -%}
{{- words(message['content']) + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The tokenizer, with the chat template."""
    return tokenizer_with(SPECIAL_TOKENS, bos="<s>", eos="</s>", pad="<pad>", chat_template=CHAT_TEMPLATE)


def _text_config(tie: bool) -> dict[str, Any]:
    """A language model whose heads together are wider than its residual stream, as in Pixtral and Mistral Small."""
    convert = tokenizer().convert_tokens_to_ids
    return {
        "model_type": "mistral",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_LENGTH_TOKENS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_window": None,
        "tie_word_embeddings": tie,
        "bos_token_id": convert("<s>"),
        "eos_token_id": convert("</s>"),
        "pad_token_id": convert("<pad>"),
    }


def _vision_config() -> dict[str, Any]:
    """A vision tower of two layers."""
    return {
        "model_type": "pixtral",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": PATCH_SIZE,
        "image_size": 448,
    }


def _write(model: Any, directory: Path, *, spatial_merge_size: int) -> None:
    """Writes a checkpoint folder laid out like those on the Hub."""
    from transformers import GenerationConfig

    convert = tokenizer().convert_tokens_to_ids
    model.generation_config = GenerationConfig(
        bos_token_id=convert("<s>"), eos_token_id=[convert("</s>")], pad_token_id=convert("<pad>")
    )
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    image_processor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "PixtralImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": PATCH_SIZE,
        "processor_class": "PixtralProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 336},
    }
    processor = {
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
        "image_token": "[IMG]",
        "patch_size": PATCH_SIZE,
        "processor_class": "PixtralProcessor",
        "spatial_merge_size": spatial_merge_size,
    }
    for name, content in (("preprocessor_config.json", image_processor), ("processor_config.json", processor)):
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _stock_processor(folder: Path) -> Any:
    """`PixtralProcessor` over the Pillow image processor.

    Its module wants torchvision only for one function, of which the Pillow module has a copy.
    """
    from transformers import AutoTokenizer, PixtralImageProcessorPil

    package = "transformers.models.pixtral"
    if f"{package}.processing_pixtral" not in sys.modules:
        missing = f"{package}.image_processing_pixtral"
        stand_in = missing not in sys.modules
        if stand_in:
            sys.modules[missing] = importlib.import_module(f"{package}.image_processing_pil_pixtral")
        importlib.import_module(f"{package}.processing_pixtral")
        if stand_in:
            del sys.modules[missing]
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    return sys.modules[f"{package}.processing_pixtral"].PixtralProcessor(
        PixtralImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        patch_size=settings["patch_size"],
        spatial_merge_size=settings["spatial_merge_size"],
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
    )


def _build_pixtral(tie: bool) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=_text_config(tie),
            vision_config=_vision_config(),
            image_token_index=tokenizer().convert_tokens_to_ids("[IMG]"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_seq_length=1,
            tie_word_embeddings=tie,
        )
    )


def _build_mistral3(tie: bool) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=_text_config(tie),
            vision_config=_vision_config(),
            image_token_index=tokenizer().convert_tokens_to_ids("[IMG]"),
            spatial_merge_size=2,
            tie_word_embeddings=tie,
        )
    )


def _tiny(build: Callable[[bool], Any], spatial_merge_size: int, projector: tuple[str, ...]) -> TinyFamily:
    vision_layer = "model.vision_tower.transformer.layers.{}"
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp = ("gate_proj", "up_proj", "down_proj")
    return TinyFamily(
        build=build,
        write=partial(_write, spatial_merge_size=spatial_merge_size),
        processor_class="PixtralProcessor",
        stock_processor=_stock_processor,
        answer_start="[/INST]",
        end_of_turn="</s>",
        pad_token="<pad>",
        image_tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        language_attention=names("model.language_model.layers.{}.self_attn.", 2, attention),
        language_mlp=names("model.language_model.layers.{}.mlp.", 2, mlp),
        vision_attention=names(f"{vision_layer}.attention.", 2, attention),
        vision_mlp=names(f"{vision_layer}.feed_forward.", 2, mlp),
        projector=projector,
        language_layers=names("model.language_model.layers.{}", 2, ("",)),
        vision_layers=names(vision_layer, 2, ("",)),
    )


_LINEAR = ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")
PIXTRAL = _tiny(_build_pixtral, 1, _LINEAR)
MISTRAL3 = _tiny(_build_mistral3, 2, ("model.multi_modal_projector.patch_merger.merging_layer", *_LINEAR))
