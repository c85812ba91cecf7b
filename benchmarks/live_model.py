"""Live models of real shapes with random weights in NF4, made layer by layer on the device: seconds, and no disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.real_size import REAL_SIZES, describe
from vlm.config import LoraConfig, ModelConfig
from vlm.families import family_by_name
from vlm.loading.checkpoint import LoadedModel
from vlm.loading.model_config import model_config
from vlm.loading.quantization import make_trainable, unquantized_modules
from vlm.processing import Processing


class _WithoutStorage(torch.nn.Linear):
    """Stands in for linear layers while a model is built, so that it never exists whole in 16 bit."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **others: Any) -> None:
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=others.get("dtype"))


def live_model(
    size: str,
    *,
    device: str,
    quantized: bool = True,
    overlay: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Builds a model, its linear layers in NF4.

    Args:
        size: Name in `REAL_SIZES`.
        device: ``"cuda"`` or ``"cpu"``.
        quantized: False leaves linear layers dense.
        overlay: Laid over the shape's configuration.
        dtype: Of computation; None for bfloat16, on a CPU float32.
    """
    import transformers

    family = family_by_name(REAL_SIZES[size].model_type)
    if dtype is None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
    folder = describe(size, Path(tempfile.mkdtemp()), config=overlay)
    config = model_config(folder, family)
    torch.manual_seed(0)
    linear = torch.nn.Linear
    with mock.patch.object(torch.nn, "Linear", _WithoutStorage), torch.device(device):
        config._attn_implementation = "sdpa"
        model = getattr(transformers, family.model_class)._from_config(config, dtype=dtype)
    waiting = {name: module for name, module in model.named_modules() if type(module) is _WithoutStorage}
    for module in waiting.values():
        module.__class__ = linear
    kept = set(unquantized_modules(model, family, ModelConfig(quantization="nf4")))
    for name, module in waiting.items():
        parent, _, child = name.rpartition(".")
        if module.weight.is_meta:
            filled = _filled(module, device, dtype, quantized=quantized and name not in kept)
            setattr(model.get_submodule(parent), child, filled)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = quantized
    make_trainable(model, dtype)
    if family.prepare_model is not None:
        family.prepare_model(model)
    return LoadedModel(model.eval(), Processing.from_dir(folder), family, device, str(dtype)[6:], folder)


def _filled(module: torch.nn.Linear, device: str, dtype: torch.dtype, *, quantized: bool) -> torch.nn.Module:
    import bitsandbytes as bnb

    shape = (module.out_features, module.in_features)
    weight = torch.randn(shape, device=device, dtype=dtype) * 0.02
    bias = torch.zeros(shape[0], device=device, dtype=dtype) if module.bias is not None else None
    with torch.device("meta"):
        layer: Any = (
            bnb.nn.Linear4bit(shape[1], shape[0], bias=bias is not None, compute_dtype=dtype, quant_type="nf4")
            if quantized
            else torch.nn.Linear(shape[1], shape[0], bias=bias is not None)
        )
    if quantized:
        packed = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
        layer.weight = packed.to(device)
    else:
        layer.weight = torch.nn.Parameter(weight)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias)
    return layer


def with_adapter(loaded: LoadedModel, rank: int = 16) -> Any:
    """Puts a fresh float32 LoRA adapter on all linear layers of vision tower and language model.

    Args:
        loaded: The base model.
        rank: Of the update matrices.

    Returns:
        The adapted model in training mode.
    """
    from vlm.lora.build import initialize, peft_config
    from vlm.lora.peft_model import adapter_parameters, wrap
    from vlm.lora.targets import select

    lora = LoraConfig(rank=rank, alpha=rank)
    model = wrap(loaded.model, peft_config(select(loaded.model, loaded.family, lora), lora, "random weights"))
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    initialize(model, 0)
    return model.train()
