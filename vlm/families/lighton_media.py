"""Image handling of LightOnOCR: Pixtral's sizes, but one unbroken run of tokens per image.

A token covers a square of merged patches. The image processor rounds an image's sides up to a size of its own, which
checkpoints set to the side of a token; where it is the side of a patch, an odd line of patches at an edge is dropped.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vlm.errors import DataError
from vlm.families import pixtral_media
from vlm.families.family import ImageLayout, MediaParts, RowImages, Run

IMAGE_TOKEN = "<|image_pad|>"
# The last two stood for breaks and ends in training; the tokenizer still names them as such.
MEDIA_TOKENS = (IMAGE_TOKEN, "<|vision_pad|>", "<|vision_end|>")


def target_size(
    parts: MediaParts, height: int, width: int, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """The size that the stock processor resizes to; arguments as for Pixtral.

    Returns:
        Height and width in pixels.

    Raises:
        DataError: The image is so elongated that its short side would vanish, or smaller than a token.
    """
    new_height, new_width = pixtral_media.target_size(_rounding(parts), height, width, min_pixels, max_pixels)
    side = pixels_per_token(parts)
    if min(new_height, new_width) < side:
        raise DataError(
            f"an image of {height} x {width} pixels is smaller than the {side} x {side} of a single token; enlarge it"
        )
    return new_height, new_width


def image_layout(parts: MediaParts, height: int, width: int) -> ImageLayout:
    """One image token per whole square of merged patches of an image at its target size."""
    side = pixels_per_token(parts)
    return (Run(IMAGE_TOKEN, (height // side) * (width // side)),)


def pixel_inputs(parts: MediaParts, images: RowImages) -> dict[str, Any]:
    """All images of the batch, padded to the largest; the model cuts the padding off again.

    Returns:
        ``pixel_values`` of shape [images, 3, height, width], still as bytes, and ``image_sizes`` of shape [images, 2]
        (height, width); nothing for a batch without images.
    """
    return pixtral_media.pixel_inputs(_rounding(parts), images)


def pixels_per_token(parts: MediaParts) -> int:
    """Side of the square of pixels behind one image token."""
    return int(parts.settings.get("patch_size", 14)) * int(parts.settings.get("spatial_merge_size", 2))


def _rounding(parts: MediaParts) -> MediaParts:
    """The same pieces with the image processor's own size to round to in the place where Pixtral's functions look."""
    size = parts.image_processor.patch_size
    return dataclasses.replace(parts, settings={"patch_size": size if isinstance(size, int) else size["height"]})
