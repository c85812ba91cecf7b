"""A notebook's options as settings of the core. Imports nothing heavy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vlm.config.base import Section
from vlm.config.model import Precision, Quantization
from vlm.errors import ConfigError

Checked = TypeVar("Checked", bound=Section)
LOADING = "FastVisionModel.from_pretrained"
ADAPTING = "FastVisionModel.get_peft_model"
FIXED_LOADING: dict[str, tuple[Any, str]] = {
    "trust_remote_code": (False, "no code from a repository is ever run; give a family of the table in vlm/families"),
    "fast_inference": (False, "there is no second inference engine; leave it out"),
    "rope_scaling": (None, "positions are the model's own; leave it out"),
    "resize_model_vocab": (None, "the vocabulary is the model's own; leave it out"),
    "return_logits": (False, "the trainer makes logits where they are needed; leave it out"),
    "fix_tokenizer": (True, "the tokenizer is used as it is; leave it out"),
    "attn_implementation": ("sdpa", "attention is PyTorch's scaled dot product; leave it out"),
}
FIXED_ADAPTING: dict[str, tuple[Any, str]] = {
    "bias": ("none", "biases are not trained beside an adapter; use 'none'"),
    "loftq_config": (None, "adapters start from zero, not from quantisation errors; leave it out"),
    "init_lora_weights": (True, "the start is seeded noise for A and zero for B; leave it out"),
    "layers_to_transform": (None, "give last_language_layers or last_vision_layers, or full names in target_modules"),
    "layers_pattern": (None, "give full names or regular expressions in target_modules"),
    "task_type": ("CAUSAL_LM", "leave it out"),
    "qat_scheme": (None, "quantisation-aware training is not known here; leave it out"),
    "target_parameters": (None, "give modules in target_modules"),
    "ensure_weight_tying": (False, "weights trained whole are untied in exports; leave it out"),
}


def checked(call: str, section: type[Checked], **settings: Any) -> Checked:
    """A configuration section of the core from a call's options.

    Args:
        call: Name of the function, for messages.
        section: Class of the section.
        **settings: Its fields.

    Raises:
        ConfigError: A value is wrong.
    """
    try:
        return section(**settings)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))} {item['msg']}".strip() for item in error.errors()]
        raise ConfigError(f"{call}: {'; '.join(problems)}") from error


def quantization_of(four: bool, eight: bool, sixteen: bool, full: bool) -> Quantization:
    """How linear layers are stored, by the ``load_in_*`` options.

    Args:
        four: ``load_in_4bit``.
        eight: ``load_in_8bit``.
        sixteen: ``load_in_16bit``.
        full: ``full_finetuning``.

    Raises:
        ConfigError: They contradict each other.
    """
    chosen = [name for name, on in (("load_in_4bit", four), ("load_in_8bit", eight), ("load_in_16bit", sixteen)) if on]
    if len(chosen) > 1:
        hint = ", which is on by default" if four else ""
        raise ConfigError(f"{LOADING}: {' and '.join(chosen)} exclude each other; turn off {chosen[0]}{hint}")
    if full and (four or eight):
        raise ConfigError(
            f"{LOADING}: full_finetuning trains weights in full precision, which {chosen[0]}=True takes away;"
            f" set {chosen[0]}=False"
        )
    return "nf4" if four else "int8" if eight else "none"


def checkpointing_of(value: bool | str) -> bool:
    """Whether activations are recomputed; ``"unsloth"``, which notebooks write, means True.

    Raises:
        ConfigError: The value is unknown.
    """
    if value not in (True, False, "unsloth"):
        raise ConfigError(f"use_gradient_checkpointing {value!r} is unknown; use True or False ('unsloth' means True)")
    return bool(value)


def precision_of(dtype: Any) -> Precision:
    """The core's name of a torch dtype or its name; ``"auto"`` for None.

    Raises:
        ConfigError: It is no floating-point type to compute in.
    """
    if dtype is None:
        return "auto"
    known: dict[str, Precision] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ConfigError(f"{LOADING}: dtype {dtype!r} is unknown; use float32, bfloat16, float16 or None")
    return known[name]


def device_of(device_map: Any) -> str:
    """``"auto"``, ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: The map spreads a model over devices, or names an unknown one.
    """
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map in ("auto", "sequential", None):
        return "auto"
    if device_map == "cpu" or device_map == 0 or str(device_map) in ("cuda", "cuda:0"):
        return "cpu" if device_map == "cpu" else "cuda"
    raise ConfigError(
        f"{LOADING}: device_map {device_map!r} cannot be used, a model lies on one device; use 'auto', 'cpu' or 'cuda', and"
        " CUDA_VISIBLE_DEVICES to choose a GPU"
    )


def adapter_folder(name: str) -> Path | None:
    """The folder, where a name is one that holds an adapter; else None."""
    path = Path(name).expanduser()
    return path if (path / "adapter_config.json").is_file() else None


def base_of(adapter_dir: Path) -> str:
    """Name of the base model that an adapter was made for.

    Raises:
        ConfigError: It is not on record.
    """
    config = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{adapter_dir}/adapter_config.json names no base model; put it into base_model_name_or_path")
    return base


@contextmanager
def hub_token(token: str | None) -> Iterator[None]:
    """Lets the Hub's client find a token for the length of a block."""
    if token is None:
        yield
        return
    before = os.environ.get("HF_TOKEN")
    os.environ["HF_TOKEN"] = token
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_TOKEN"]
        else:
            os.environ["HF_TOKEN"] = before
