"""Exports ``merged_4bit`` and ``merged_8bit``: the merged model, quantised anew as transformers with bitsandbytes loads it.

The adapter is folded into float32 weights first, those are rounded to the model's 16-bit type, as anybody would quantise
the 16-bit export, and only then quantised. (Folding an update into weights that are 4-bit already would round it away:
a step between two neighbours of the 4-bit code is larger than most updates.) Weights go through one by one.

    4 bit   NF4 (arXiv:2305.14314): blocks of 64 weights, each the nearest of 16 values times the block's largest
    8 bit   LLM.int8() (arXiv:2208.07339): rows, each weight a 127th of the row's largest

Every weight is compared with its merged original before it is written, and its image of a probe vector once more after
it has been read back. Loads torch and bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from vlm.config import ModelConfig
from vlm.errors import ExportError
from vlm.export.merging import MergedModel, check_keys, probe
from vlm.export.shards import ShardWriter
from vlm.export.stored_weights import StoredWeights, stored_names, stored_scales

# Half the widest gap between neighbours of NF4's 16 values (-1 and -0.696): the most that rounding moves a weight,
# in units of its block's largest. Quantising the block's largest itself adds less than half a hundredth.
_NF4_ROUNDING = 0.152 + 0.005
# Half a step of a 127th, and the rounding to float16 that bitsandbytes does first.
_INT8_ROUNDING = 0.5 / 127 + 2**-11


def export_quantized(
    bits: Literal[4, 8],
    checkpoint_dir: Path,
    adapter_dir: Path,
    output_dir: Path,
    *,
    max_shard_size_mb: int,
    device: str,
    figures: Mapping[str, Any] | None = None,
) -> int:
    """Writes a whole quantised model that plain transformers loads, with the modules that are not quantised by name.

    The head stays in 16 bit, as do the parts that the checkpoint keeps so, and modules that were trained whole.

    Args:
        bits: 4 or 8.
        checkpoint_dir: Base model.
        adapter_dir: Trained adapter.
        output_dir: An existing folder.
        max_shard_size_mb: Largest weights file, in 10^6 bytes.
        device: ``cpu`` or ``cuda``, where weights are merged and quantised.
        figures: Content of ``figures.json`` for the card, if wanted.

    Returns:
        Number of merged modules; after full fine-tuning, of trained tensors.

    Raises:
        ExportError: Adapter and checkpoint do not fit together, or what was written is not what was trained.
    """
    from vlm.loading.quantization import quantization_config, unquantized_modules
    from vlm.loading.stored_names import older_names

    merged = MergedModel(checkpoint_dir, adapter_dir, device)
    settings = ModelConfig(
        quantization="nf4" if bits == 4 else "int8",
        double_quantization=merged.description["double_quantization"] or merged.description["quantization"] != "nf4",
        keep_unquantized=tuple(merged.description["keep_unquantized"]),
    )
    linear = [name for name, module in merged.bare.named_modules() if isinstance(module, torch.nn.Linear)]
    skipped = unquantized_modules(merged.bare, merged.family, settings)
    whole = tuple(merged.targets["modules_to_save"])
    skipped += [name for name in linear if name not in skipped and _is_within(name, whole)]
    quantized = set(linear) - set(skipped)

    writer = ShardWriter(output_dir, max_shard_size_mb * 1_000_000)
    images: dict[str, torch.Tensor] = {}
    num_quantized = 0
    for group in merged.groups():
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in group.tensors.items():
            if name in group.images:
                _check_merge(name, tensor, group.images[name])
            tensor = tensor.to(merged.dtype) if tensor.is_floating_point() else tensor
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and module in quantized:
                pieces, restored = _quantize(module, tensor.to(device), bits, settings.double_quantization)
                _check_rounding(name, tensor.to(device), restored, bits)
                images[name] = (restored @ probe(restored.shape[-1], device)).cpu()
                tensors.update(pieces)
                num_quantized += 1
            else:
                tensors[name] = tensor
        for key, tensor in zip(older_names(merged.bare, list(tensors)), tensors.values(), strict=True):
            writer.add(key, tensor)
    if num_quantized != len(quantized):
        raise ExportError(
            f"{num_quantized} of {len(quantized)} linear layers were quantised; load the model again with the installed"
            " transformers"
        )
    placed = writer.finish()
    key_of = stored_names(merged.bare)
    expected = {key for name, key in key_of.items() if not (merged.tied and name == merged.head_name)}
    weights = StoredWeights(output_dir, device, stored_scales(merged.bare))
    check_keys({key: placed[key] for key in weights.keys()}, expected)  # noqa: SIM118, no mapping
    for name, image in images.items():
        weight = weights.read(key_of[name])
        found = (weight.float() @ probe(weight.shape[-1], device)).cpu()
        # The same numbers through the same sum, but for the last bits of float32.
        if not float((found - image).abs().max()) <= 1e-4 * float(weight.float().norm(dim=-1).max()):
            raise ExportError(f"the weight {key_of[name]!r} reads differently from how it was written; check the disk")
    config = quantization_config(settings, skipped, merged.dtype)
    assert config is not None
    merged.write_surroundings(output_dir, f"merged_{bits}bit", quantization=config.to_dict(), figures=figures)
    return merged.num_trained


def _is_within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _quantize(
    module: str, weight: torch.Tensor, bits: int, double: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Quantises a weight.

    Args:
        module: Full name of the linear layer.
        weight: Tensor of shape [outputs, inputs], 16 or 32 bit.
        bits: 4 or 8.
        double: Whether NF4's block scales are quantised too.

    Returns:
        What is stored, by name, and the weight that a reader gets from that, float32.
    """
    from bitsandbytes import functional

    if bits == 8:
        rows, row_maximum, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        # The third tensor says "by rows", the one format that is left.
        layout = torch.zeros((), dtype=torch.uint8)
        stored = {f"{module}.weight": rows, f"{module}.SCB": row_maximum, f"{module}.weight_format": layout}
        return stored, rows.float() * (row_maximum.float() / 127)[:, None]
    packed, state = functional.quantize_4bit(weight.contiguous(), compress_statistics=double, quant_type="nf4")
    stored = {f"{module}.weight.{ending}": tensor for ending, tensor in state.as_dict(packed=True).items()}
    state.dtype = torch.float32  # of what is read here, not of what is on record
    return {f"{module}.weight": packed, **stored}, functional.dequantize_4bit(packed, quant_state=state).float()


def _check_merge(name: str, weight: torch.Tensor, image: torch.Tensor) -> None:
    found = weight.float() @ probe(weight.shape[-1], str(weight.device))
    # float32's own summation error, over rows of up to some thousand terms.
    if not float((found - image[..., 0]).abs().max()) <= 1e-4 * float(weight.float().norm(dim=-1).max()):
        raise ExportError(
            f"the merged weight {name!r} gives outputs that are away from the adapter's; please report this with the model's"
            " name"
        )


def _check_rounding(name: str, weight: torch.Tensor, restored: torch.Tensor, bits: int) -> None:
    """Every element must be within the format's bound of what it stands for."""
    error = (restored - weight.float()).abs()
    if bits == 8:
        allowed = _INT8_ROUNDING * weight.float().abs().amax(dim=1, keepdim=True)
    else:
        blocks = torch.nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % 64)).view(-1, 64)
        # Blocks with small values suffer from the coarse second quantisation of their scales: a 127th of the largest.
        largest = blocks.abs().amax(dim=1, keepdim=True)
        allowed = (
            (_NF4_ROUNDING * largest + largest.max() / 127)
            .expand_as(blocks)
            .flatten()[: weight.numel()]
            .view_as(weight)
        )
    if bool((error > allowed).any()):
        raise ExportError(
            f"quantising {name!r} to {bits} bits moved a weight by {float((error - allowed).max()):.3g} more than the format"
            " can; please report this with the versions of torch and bitsandbytes"
        )
