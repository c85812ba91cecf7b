"""Checkpoints of the real models' shapes with random weights, made on the spot.

Speed and memory do not depend on the values of weights, so random ones measure both honestly; quality they cannot show.
Tokenizers and chat templates are the tests' tiny ones; widths, depths, vocabularies and image limits are the published
models'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.tiny_models import make_tiny_checkpoint

# Lets Qwen's processors take pages at up to 1,280 visual tokens, as they are mostly used for documents.
_QWEN_IMAGES = {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}}
_QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_QWEN2_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
_QWEN2_5_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


@dataclass(frozen=True, kw_only=True)
class RealSize:
    """A published model's shape.

    Attributes:
        model_type: Name in the family table.
        config: Laid over the tiny model's ``config.json``; None removes a key.
        images: Laid over its ``preprocessor_config.json``; None removes the file.
        tied: Whether head and embeddings share their weights.
    """

    model_type: str
    config: Mapping[str, Any]
    images: Mapping[str, Any] | None = field(default_factory=dict)
    tied: bool = False


def _qwen_text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rope_parameters": _QWEN_ROPE,
        "layer_types": None,
        "max_window_layers": layers,
    }


_DEEPSEEK_LANGUAGE = {
    "hidden_size": 1280,
    "intermediate_size": 6848,
    "moe_intermediate_size": 896,
    "n_routed_experts": 64,
    "num_attention_heads": 10,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 12,
    "num_key_value_heads": 10,
    "max_position_embeddings": 8192,
    "vocab_size": 129280,
}


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> RealSize:
    return RealSize(
        model_type="mllama",
        config={
            "text_config": {
                "hidden_size": hidden,
                "intermediate_size": intermediate,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": 8,
                "vocab_size": 128256,
                "cross_attention_layers": list(range(3, layers, 5)),
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            },
            "vision_config": {
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_hidden_layers": 32,
                "num_global_layers": 8,
                "attention_heads": 16,
                "image_size": 560,
                "intermediate_layers_indices": [3, 7, 15, 23, 30],
                "vision_output_dim": 7680,
            },
        },
        images={"size": {"height": 560, "width": 560}},
    )


REAL_SIZES: dict[str, RealSize] = {
    "qwen2_vl_2b": RealSize(
        model_type="qwen2_vl",
        config={
            "text_config": _qwen_text(1536, 8960, 28, 12, 2, 151936),
            "vision_config": {**_QWEN2_VISION, "hidden_size": 1536},
        },
        images=_QWEN_IMAGES,
        tied=True,
    ),
    "qwen2_5_vl_3b": RealSize(
        model_type="qwen2_5_vl",
        config={
            "text_config": _qwen_text(2048, 11008, 36, 16, 2, 151936),
            "vision_config": {**_QWEN2_5_VISION, "out_hidden_size": 2048},
        },
        images=_QWEN_IMAGES,
        tied=True,
    ),
    "qwen2_5_vl_7b": RealSize(
        model_type="qwen2_5_vl",
        config={
            "text_config": _qwen_text(3584, 18944, 28, 28, 4, 152064),
            "vision_config": {**_QWEN2_5_VISION, "out_hidden_size": 3584},
        },
        images=_QWEN_IMAGES,
    ),
    "qwen2_vl_72b": RealSize(
        model_type="qwen2_vl",
        config={
            "text_config": _qwen_text(8192, 29568, 80, 64, 8, 152064),
            "vision_config": {**_QWEN2_VISION, "hidden_size": 8192},
        },
        images=_QWEN_IMAGES,
    ),
    "llama3_2_vision_11b": _llama(4096, 14336, 40, 32),
    "llama3_2_vision_90b": _llama(8192, 28672, 100, 64),
    "pixtral_12b": RealSize(
        model_type="pixtral",
        config={
            "text_config": {
                "hidden_size": 5120,
                "intermediate_size": 14336,
                "num_hidden_layers": 40,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 131072,
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
            },
            "vision_config": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "head_dim": 64,
                "image_size": 1024,
                "patch_size": 16,
            },
        },
        images={"size": {"longest_edge": 1024}, "patch_size": 16},
    ),
    "deepseek_ocr": RealSize(
        model_type="deepseek_ocr",
        config={
            **_DEEPSEEK_LANGUAGE,
            "language_config": _DEEPSEEK_LANGUAGE,
            "projector_config": {"input_dim": 2048, "n_embed": 1280},
            "vision_config": {
                "image_size": 1024,
                "width": {
                    "clip-l-14-224": {"heads": 16, "image_size": 224, "layers": 24, "width": 1024},
                    "sam_vit_b": {
                        "downsample_channels": [512, 1024],
                        "global_attn_indexes": [2, 5, 8, 11],
                        "heads": 12,
                        "layers": 12,
                        "width": 768,
                    },
                },
            },
        },
        images=None,
    ),
}


def describe(size: str, directory: Path, *, config: Mapping[str, Any] | None = None) -> Path:
    """Writes a checkpoint folder without weights: configuration, tokenizer and processor.

    Args:
        size: Name in `REAL_SIZES`.
        directory: Made if need be.
        config: Laid over that shape's configuration, such as fewer layers.

    Returns:
        The folder.
    """
    real = REAL_SIZES[size]
    make_tiny_checkpoint(real.model_type, directory, tie_word_embeddings=real.tied)
    (directory / "model.safetensors").unlink()
    _write(directory / "config.json", _overlay(_overlay(_read(directory / "config.json"), real.config), config or {}))
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = directory / name
        if real.images is None and name == "preprocessor_config.json":
            path.unlink()
        elif path.exists():
            known = _read(path)
            shared = {key: value for key, value in (real.images or {}).items() if key in known}
            _write(path, {**known, **shared})
    return directory


def make_checkpoint(size: str, directory: Path, *, config: Mapping[str, Any] | None = None) -> Path:
    """Writes a checkpoint folder in bfloat16, on the GPU where there is one.

    Args:
        size: Name in `REAL_SIZES`.
        directory: Made if need be.
        config: Laid over that shape's configuration, such as fewer layers.

    Returns:
        The folder.
    """
    import torch
    import transformers

    from vlm.families import family_by_name
    from vlm.loading.model_config import model_config

    real = REAL_SIZES[size]
    describe(size, directory, config=config)
    settings = _read(directory / "config.json")
    family = family_by_name(real.model_type)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model_class = getattr(transformers, family.model_class)
        model = model_class._from_config(model_config(directory, family), dtype=torch.bfloat16)
    generation = (directory / "generation_config.json").read_bytes() if real.model_type != "deepseek_ocr" else None
    model.save_pretrained(directory, max_shard_size="4GB")
    if generation is not None:
        (directory / "generation_config.json").write_bytes(generation)
    _write(directory / "config.json", settings)  # as published, where that is not the native layout
    return directory


def _overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _overlay(merged[key], value)
        else:
            merged[key] = value
    return merged


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
