"""The values in the heads of GGUF files: sizes, rotary embedding, tokenizer, chat template, image normalisation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlm.errors import ExportError
from vlm.families.gguf import GgufLayout, Value
from vlm.processing import Processing

# Pixels; larger than any processor lets an image be.
_LARGE_SIDE = 2**15
# Kinds of tokens, by llama.cpp's numbers.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# llama.cpp's names of the patterns that cut text into words. Qwen's and Llama 3's differ in how many digits make a word.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_PRE_TOKENIZERS = {
    _WORDS.format(digits=""): "qwen2",
    _WORDS.format(digits="{1,3}"): "llama-bpe",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}


def language_metadata(layout: GgufLayout, config: Mapping[str, Any]) -> dict[str, Value | list[int]]:
    """Sizes of the language model.

    Args:
        layout: Of the family.
        config: Content of `config.json` with all defaults.

    Raises:
        ExportError: The model has a variant that is not written here.
    """
    text = config["text_config"]
    rope = text.get("rope_parameters") or {}
    if rope.get("rope_type", "default") not in ("default", "mrope"):
        raise ExportError(
            f"export.types has 'gguf', but the language model scales its rotary embedding ({rope['rope_type']!r}), which is"
            " not written for llama.cpp here; take 'gguf' out"
        )
    if text.get("model_type") == "ministral3":
        raise ExportError(
            "export.types has 'gguf', but a 'ministral3' language model scales its queries by position, which is not written"
            " for llama.cpp here; take 'gguf' out"
        )
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    name = layout.architecture
    found: dict[str, Value | list[int]] = {
        f"{name}.block_count": text["num_hidden_layers"],
        f"{name}.context_length": text["max_position_embeddings"],
        f"{name}.embedding_length": text["hidden_size"],
        f"{name}.feed_forward_length": text["intermediate_size"],
        f"{name}.attention.head_count": text["num_attention_heads"],
        f"{name}.attention.head_count_kv": text["num_key_value_heads"],
        f"{name}.attention.key_length": head_dim,
        f"{name}.attention.value_length": head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": float(text["rms_norm_eps"]),
        f"{name}.rope.freq_base": float(rope["rope_theta"]),
        f"{name}.rope.dimension_count": head_dim,
        f"{name}.vocab_size": text["vocab_size"],
    }
    if "mrope_section" in rope:
        sections = [int(size) for size in rope["mrope_section"]]
        found[f"{name}.rope.dimension_sections"] = sections + [0] * (4 - len(sections))
    return found


def vision_metadata(layout: GgufLayout, config: Mapping[str, Any], processing: Processing) -> dict[str, Value]:
    """Values of the mmproj file.

    Args:
        layout: Of the family.
        config: Content of `config.json` with all defaults.
        processing: The model's processor.
    """
    images = processing.image_processor
    return {
        "clip.projector_type": layout.projector,
        "clip.has_vision_encoder": True,
        "clip.vision.projection_dim": config["text_config"]["hidden_size"],
        "clip.vision.patch_size": config["vision_config"]["patch_size"],
        "clip.vision.image_mean": [float(value) for value in images.image_mean],
        "clip.vision.image_std": [float(value) for value in images.image_std],
        **layout.vision_metadata(config),
    }


def image_token_limits(head: Mapping[str, Any], processing: Processing) -> tuple[int, int]:
    """The fewest and the most tokens that the model's processor makes of a square image, as llama.cpp counts them.

    Args:
        head: Values of the mmproj file.
        processing: The model's processor.
    """
    side = head["clip.vision.patch_size"] * head.get("clip.vision.spatial_merge_size", 1)
    sizes = (processing.target_size(1, 1), processing.target_size(_LARGE_SIDE, _LARGE_SIDE))
    smallest, largest = (height * width // side**2 for height, width in sizes)
    return smallest, largest


def tokenizer_metadata(
    layout: GgufLayout, processing: Processing, vocab_size: int
) -> dict[str, Value | list[int] | list[str]]:
    """The tokenizer and the chat template.

    Args:
        layout: Of the family.
        processing: The model's processor.
        vocab_size: Rows of the embeddings; ids without a token get a name of their own.

    Raises:
        ExportError: The tokenizer does not merge byte pairs.
    """
    tokenizer = processing.tokenizer
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ExportError(
            f"export.types has 'gguf', but the tokenizer is of type {model['type']!r} and only byte-level BPE is written for"
            " llama.cpp here; take 'gguf' out"
        )
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_id) >= vocab_size:
        raise ExportError(
            f"the tokenizer has {max(by_id) + 1} tokens but the model embeds {vocab_size}; use the tokenizer that belongs to"
            " the model"
        )
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(vocab_size):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        if number not in by_id:
            kinds.append(_UNUSED)
        elif number in added:
            kinds.append(_CONTROL if added[number].special else _USER_DEFINED)
        else:
            kinds.append(_NORMAL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    found: dict[str, Value | list[int] | list[str]] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer(layout, description),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": processing.stop_token_ids[0],
        "tokenizer.ggml.padding_token_id": processing.pad_token_id,
        "tokenizer.ggml.add_bos_token": puts_bos(processing),
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": processing.chat_template,
    }
    if tokenizer.bos_token_id is not None:
        found["tokenizer.ggml.bos_token_id"] = tokenizer.bos_token_id
    return found


def pre_tokenizer(layout: GgufLayout, description: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rule by which the tokenizer at hand cuts text into words.

    Tokenizers of one family differ: some were published with another family's pattern, and models were trained with it.

    Args:
        layout: Of the family; its name stands for patterns that are not known here.
        description: Content of `tokenizer.json`.
    """
    steps = description.get("pre_tokenizer") or {}
    for step in steps.get("pretokenizers", [steps]):
        pattern = step.get("pattern", {}).get("Regex") if step.get("type") == "Split" else None
        if pattern in _PRE_TOKENIZERS:
            return _PRE_TOKENIZERS[pattern]
    return layout.pre_tokenizer


def puts_bos(processing: Processing) -> bool:
    """Whether the tokenizer puts a token before every text.

    Args:
        processing: The model's processor.
    """
    tokenizer = processing.tokenizer
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
