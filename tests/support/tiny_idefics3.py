"""Tiny random Idefics3 and SmolVLM checkpoints: tiles of 40 pixels, four image tokens each, at most 2 x 2 of them."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tests.support.tiny_family import TinyFamily, names
from tests.support.tiny_tokenizers import MAX_LENGTH_TOKENS, NUM_ORDINARY, tokenizer_with

# Sides of the tests' images are no multiples of it: they go all the way from an image's own size to its tiles.
TILE_SIZE = 40
AROUND, IMAGE, GLOBAL, END = "<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"
LABELS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
# As published: the first model spells a tile's label out, the second has tokens for them.
SPECIAL_TOKENS = {
    "idefics3": ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", AROUND, IMAGE, END),
    "smolvlm": ("<|im_start|>", "<|endoftext|>", "<|im_end|>", AROUND, IMAGE, END, GLOBAL, *LABELS),
}
BEGIN = {"idefics3": "<|begin_of_text|>", "smolvlm": "<|im_start|>"}
PAD = {"idefics3": "<|pad|>", "smolvlm": "<|im_end|>"}
# A role's name, a colon, and a blank unless the turn begins with an image; so the blank belongs to an answer.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- message['role'] | capitalize + ':' -}}
{%- if message['content'] is string -%}
{{- ' ' + message['content'] -}}
{%- else -%}
{%- if not (message['content'] and message['content'][0]['type'] == 'image') -%}{{- ' ' -}}{%- endif -%}
{%- for part in message['content'] -%}{{- '<image>' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<end_of_utterance>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""
IMAGE_PROCESSOR = {
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": TILE_SIZE},
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 2 * TILE_SIZE},
}


@lru_cache
def tokenizer(model_type: str) -> Any:
    """The tokenizer of one of the two, with the chat template."""
    return tokenizer_with(
        SPECIAL_TOKENS[model_type],
        bos=BEGIN[model_type],
        eos=END,
        pad=PAD[model_type],
        chat_template=CHAT_TEMPLATE,
    )


def build(model_type: str, config_class: str, model_class: str, tie: bool) -> Any:
    """A model over the tokens of `tokenizer`."""
    import transformers

    convert = tokenizer(model_type).convert_tokens_to_ids
    text = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": NUM_ORDINARY + len(SPECIAL_TOKENS[model_type]),
        "max_position_embeddings": MAX_LENGTH_TOKENS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": convert(BEGIN[model_type]),
        "eos_token_id": convert(END),
        "pad_token_id": convert(PAD[model_type]),
        "tie_word_embeddings": tie,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": TILE_SIZE,
        "patch_size": 10,
    }
    config = getattr(transformers, config_class)(
        text_config=text,
        vision_config=vision,
        image_token_id=convert(IMAGE),
        scale_factor=2,
        tie_word_embeddings=tie,
        pad_token_id=convert(PAD[model_type]),
    )
    return getattr(transformers, model_class)(config)


def write(model_type: str, name: str, model: Any, directory: Path) -> None:
    """Writes a checkpoint folder laid out like those on the Hub."""
    from transformers import GenerationConfig

    convert = tokenizer(model_type).convert_tokens_to_ids
    model.generation_config = GenerationConfig(
        bos_token_id=convert(BEGIN[model_type]), eos_token_id=[convert(END)], pad_token_id=convert(PAD[model_type])
    )
    model.save_pretrained(directory)
    tokenizer(model_type).save_pretrained(directory)
    classes = {"image_processor_type": f"{name}ImageProcessor", "processor_class": f"{name}Processor"}
    for file, content in (
        ("preprocessor_config.json", {**IMAGE_PROCESSOR, **classes}),
        ("processor_config.json", {"image_seq_len": 4, "processor_class": f"{name}Processor"}),
    ):
        (directory / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _settings(folder: Path) -> dict[str, Any]:
    return {
        "image_seq_len": json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["image_seq_len"],
        "chat_template": (folder / "chat_template.jinja").read_text(encoding="utf-8"),
    }


def _stock_idefics3(folder: Path) -> Any:
    from transformers import AutoTokenizer, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    return Idefics3Processor(
        Idefics3ImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), **_settings(folder)
    )


def _stock_smolvlm(folder: Path) -> Any:
    """The stock processor without its video part, which needs torchvision and a package that spells numbers."""
    from unittest import mock

    from transformers import AutoTokenizer, SmolVLMProcessor
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    class WithoutVideo(SmolVLMProcessor):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name != "video_processor":
                return super().check_argument_for_proper_class(argument_name, argument)
            return None

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            # The class's own version looks up settings of the video processor first.
            return super(SmolVLMProcessor, self).apply_chat_template(*args, **kwargs)

    with mock.patch.object(processing_smolvlm, "num2words", object()):
        return WithoutVideo(
            SmolVLMImageProcessorPil.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
            None,
            **_settings(folder),
        )


def _tiny(model_type: str, name: str, stock_processor: Any) -> TinyFamily:
    return TinyFamily(
        build=partial(build, model_type, f"{name}Config", f"{name}ForConditionalGeneration"),
        write=partial(write, model_type, name),
        processor_class=f"{name}Processor",
        stock_processor=stock_processor,
        answer_start="Assistant:",
        end_of_turn=END,
        pad_token=PAD[model_type],
        image_tokens=tuple(
            token for token in SPECIAL_TOKENS[model_type] if token in (AROUND, IMAGE, GLOBAL) or token in LABELS
        ),
        language_attention=names("model.text_model.layers.{}.self_attn.", 2, ("q_proj", "k_proj", "v_proj", "o_proj")),
        language_mlp=names("model.text_model.layers.{}.mlp.", 2, ("gate_proj", "up_proj", "down_proj")),
        vision_attention=names(
            "model.vision_model.encoder.layers.{}.self_attn.", 2, ("q_proj", "k_proj", "v_proj", "out_proj")
        ),
        vision_mlp=names("model.vision_model.encoder.layers.{}.mlp.", 2, ("fc1", "fc2")),
        projector=("model.connector.modality_projection.proj",),
        language_layers=names("model.text_model.layers.{}", 2, ("",)),
        vision_layers=names("model.vision_model.encoder.layers.{}", 2, ("",)),
        answer_lead=" ",
        images_by_row=True,
        implied_inputs=("pixel_attention_mask",),
    )


IDEFICS3 = _tiny("idefics3", "Idefics3", _stock_idefics3)
SMOLVLM = _tiny("smolvlm", "SmolVLM", _stock_smolvlm)
