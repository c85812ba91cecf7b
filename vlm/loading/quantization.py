"""bitsandbytes quantisation through transformers, with the traps of it taken care of.

* transformers matches the modules to skip from the start of the full name or as an ending, so `visual` alone matches
  nothing. The list here therefore holds the full name of every linear layer to keep.
* An own list replaces the default one, which holds the head; so the head is always in it.
* On CPUs with AVX512-BF16 the first forward pass in eval mode repacks a 4-bit weight into a form without a backward
  pass, and training goes on without gradients. `make_trainable` turns the repacking off.
* An 8-bit layer takes no input of four dimensions on a CPU. `make_trainable` mends that too.

Imports torch and transformers when its functions are called.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from vlm.config.model import ModelConfig
from vlm.families import Family

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel


def blueprint(family: Family, config: PretrainedConfig) -> PreTrainedModel:
    """The model without storage for its weights, to read names and shapes from."""
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, family.model_class)(config)


def unquantized_modules(model: PreTrainedModel, family: Family, settings: ModelConfig) -> list[str]:
    """Full names of the linear layers that stay in 16 or 32 bit: the head and the parts that the settings name."""
    import torch

    kept = {"head", *settings.keep_unquantized}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and family.part_of(name) in kept
    ]


def expert_parameters(model: Any, family: Family) -> list[str]:
    """Full names of the 3-D parameters of routed experts, in the model's order.

    They are no linear layers, so bitsandbytes passes them by, and peft adapts them in a way of its own.
    """
    if family.language_expert_parameters is None:
        return []
    pattern = re.compile(family.language_expert_parameters)
    return [name for name, _ in model.named_parameters() if pattern.fullmatch(name)]


def quantization_config(settings: ModelConfig, skipped: list[str], dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The configuration for transformers; None without quantisation.

    Args:
        settings: Of the model, ``"auto"`` settled.
        skipped: Full names of the linear layers to leave alone.
        dtype: Of computation with 4-bit weights.
    """
    from transformers import BitsAndBytesConfig

    assert settings.quantization != "auto"
    if settings.quantization == "none":
        return None
    if settings.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def make_trainable(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Sets what every quantised layer needs to be trained through, also after passes in eval mode.

    Args:
        model: As loaded; changed in place.
        dtype: Of computation with 4-bit weights. A checkpoint made on a GPU names bfloat16, which a CPU must not use.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype
            module.compute_type_is_set = True
        elif isinstance(module, bnb.nn.Linear8bitLt):
            module.forward = partial(_forward_of_rows, module)  # type: ignore[method-assign]


def _forward_of_rows(module: Any, x: torch.Tensor) -> torch.Tensor:
    """An 8-bit layer's pass over an input of any shape; bitsandbytes refuses four dimensions, as SAM's windows have."""
    rows = type(module).forward(module, x.flatten(0, -2) if x.ndim > 3 else x)
    return rows.unflatten(0, x.shape[:-1]) if x.ndim > 3 else rows


# By logger: a note for every 8-bit layer of every pass in float32 or bfloat16; and that, on CPUs with AVX512-BF16, a kernel
# could not be fetched from the Hub, which is for the repacked weights that `make_trainable` turns off.
_NOTES = {
    "bitsandbytes.autograd._functions": "inputs will be cast from",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


class _WithoutNote(logging.Filter):
    """Drops the note that means nothing here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return _NOTES[record.name] not in record.getMessage()


def silence_bitsandbytes() -> None:
    """Drops two notes of bitsandbytes that mean nothing here; to be called before it is imported, which writes one."""
    for name in _NOTES:
        logger = logging.getLogger(name)
        if not any(isinstance(existing, _WithoutNote) for existing in logger.filters):
            logger.addFilter(_WithoutNote())


def is_quantized(config: Mapping[str, Any]) -> str | None:
    """Method with which a checkpoint is quantised already, by its `config.json`; None if it is not."""
    section = config.get("quantization_config")
    return str(section.get("quant_method", "unknown")) if isinstance(section, Mapping) else None


def stored_quantization(config: Mapping[str, Any]) -> tuple[str, bool] | None:
    """What a checkpoint is quantised to, where that is a form of ours.

    Args:
        config: Its `config.json`.

    Returns:
        ``"nf4"`` or ``"int8"``, and whether the block scales are quantised too; None for anything else.
    """
    if is_quantized(config) != "bitsandbytes":
        return None
    section = config["quantization_config"]
    if section.get("load_in_8bit"):
        return "int8", False
    if section.get("load_in_4bit") and section.get("bnb_4bit_quant_type") == "nf4":
        return "nf4", bool(section.get("bnb_4bit_use_double_quant"))
    return None
