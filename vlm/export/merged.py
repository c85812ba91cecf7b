"""Export ``merged_16bit``: the base model with the adapter folded into its weights, in the layout of the Hub.

Weights go through one by one, or in groups where the Hub stores some as one, and are rounded once. After writing, every
merged weight is read back and applied to a probe vector; where the Hub's layout joins or cuts weights, it joins or cuts
their images in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vlm.errors import ExportError
from vlm.export.merging import MergedModel, check_keys, probe
from vlm.export.shards import ShardWriter


def export_merged_16bit(
    checkpoint_dir: Path,
    adapter_dir: Path,
    output_dir: Path,
    *,
    max_shard_size_mb: int,
    device: str,
    figures: Mapping[str, Any] | None = None,
) -> int:
    """Writes a whole model that plain transformers loads.

    Args:
        checkpoint_dir: Base model.
        adapter_dir: Trained adapter.
        output_dir: An existing folder.
        max_shard_size_mb: Largest weights file, in 10^6 bytes.
        device: ``cpu`` or ``cuda``, where weights are merged.
        figures: Content of ``figures.json`` for the card, if wanted.

    Returns:
        Number of merged modules; after full fine-tuning, of trained tensors.

    Raises:
        ExportError: Adapter and checkpoint do not fit together, or what was written is not what was trained.
    """
    from vlm.loading.stored_names import to_hub_layout

    merged = MergedModel(checkpoint_dir, adapter_dir, device)
    writer = ShardWriter(output_dir, max_shard_size_mb * 1_000_000)
    images: dict[str, torch.Tensor] = {}
    for group in merged.groups():
        # Layouts only cut and join outputs, so the images of a probe follow them.
        images.update({key: image.cpu() for key, image in to_hub_layout(merged.bare, group.images).items()})
        for key, tensor in to_hub_layout(merged.bare, group.tensors).items():
            writer.add(key, tensor.to(merged.dtype) if tensor.is_floating_point() else tensor)
    placed = writer.finish()
    expected = set(to_hub_layout(merged.bare, merged.bare.state_dict()))
    if merged.tied:
        head = {merged.head_name: merged.bare.state_dict()[merged.head_name]}
        expected -= set(to_hub_layout(merged.bare, head))
    check_keys(placed, expected)
    _check_merged(placed, images, merged.dtype)
    merged.write_surroundings(output_dir, "merged_16bit", figures=figures)
    return merged.num_trained


def _check_merged(placed: Mapping[str, Path], images: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Reads every merged weight back and compares its image of the probe with the adapter's."""
    for key, expected in images.items():
        with safe_open(placed[key], framework="pt") as file:
            weight = file.get_tensor(key).float()
        found = weight @ probe(weight.shape[-1])
        # Rounding errors of single weights are independent, so they add up like a random walk over the row: about
        # eps · ‖row‖ for a probe of unit variance. Ten times that, and float32's own summation error, is no rounding.
        allowed = 10 * (torch.finfo(dtype).eps + 1e-5) * weight.norm(dim=-1).max()
        # Some versions of transformers drop the images' last dimension, which is 1, when they cut experts apart.
        worst = float((found - expected.reshape(found.shape)).abs().max())
        if not worst <= float(allowed):
            raise ExportError(
                f"the merged weight {key!r} gives outputs that are {worst:.3g} away from the adapter's (allowed {float(allowed):.3g});"
                " please report this with the model's name"
            )
