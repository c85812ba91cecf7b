"""A pack as the model takes it: bytes become normalised pixels on the model's device.

Grain, contrast and inversion are drawn anew each time. Loads torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vlm.builtin.model import IMAGE_PROCESSOR

Tensors = dict[str, Any]

_TEMPORAL = 2


def to_device(pack: dict[str, Any], device: torch.device) -> Tensors:
    """The arrays of a pack as tensors on a device; patches stay bytes.

    Args:
        pack: Of `vlm.pretrain.packs.PackMaker`.
        device: Of the model.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value).to(device, non_blocking=True)
        if isinstance(value, dict):
            return {name: moved(entry) for name, entry in value.items()}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [moved(entry) for entry in value]
        return value

    sizes = pack["image_grid_thw"]
    tensors = moved({name: value for name, value in pack.items() if name != "image_grid_thw"})
    # The model asks for these as numbers: on the device, each question would wait for all work before it.
    tensors["image_grid_thw"] = torch.from_numpy(sizes)
    tensors["patches_per_image"] = moved(sizes.prod(1))
    return dict(tensors)


def model_inputs(tensors: Tensors, chance: torch.Generator | None) -> Tensors:
    """What the model is called with.

    Args:
        tensors: Of `to_device`, which stay as they are.
        chance: Source of grain and contrast, on the device; None leaves the images as they were drawn.

    Returns:
        The tensors with ``pixel_values``, float32 of shape [patches, 1176], in place of ``patches``.
    """
    inputs = dict(tensors)
    patches, counts = inputs.pop("patches"), inputs.pop("patches_per_image")
    levels = patches.float() / 255
    if chance is not None:
        levels = _varied(levels, counts, chance)
    mean, deviation = (
        torch.tensor(IMAGE_PROCESSOR[name], device=levels.device)[None, :, None, None]
        for name in ("image_mean", "image_std")
    )
    # [patches, channels, frames, pixels]: grey in three channels, and a still image in two frames.
    pixels = (levels[:, None, None, :] - mean) / deviation
    inputs["pixel_values"] = pixels.expand(-1, -1, _TEMPORAL, -1).flatten(1)
    return inputs


def _varied(levels: torch.Tensor, counts: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Other contrast, brightness and grain for each image, and every twelfth in white on black."""
    num_images, device = len(counts), levels.device

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(num_images, device=device).uniform_(low, high, generator=chance)

    contrast = uniform(0.6, 1.15)
    bright = uniform(-0.12, 0.12)
    grain = uniform(-0.06, 0.06).clamp(min=0)
    inverted = uniform(0, 1) < 1 / 12
    gain = torch.where(inverted, -contrast, contrast)
    # Turns around the middle, so that neither end is lost.
    offset = torch.where(inverted, 0.5 + 0.5 * contrast, 0.5 - 0.5 * contrast) + bright
    of_image = torch.repeat_interleave(torch.stack([gain, offset, grain], 1), counts, 0, output_size=len(levels))
    noise = torch.randn(levels.shape, device=device, generator=chance)
    return (levels * of_image[:, :1] + of_image[:, 1:2] + noise * of_image[:, 2:]).clamp(0, 1)
