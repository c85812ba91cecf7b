"""Image handling that the Qwen-VL models share: native resolution, patches merged 2 x 2, one token each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlm.errors import DataError
from vlm.families.family import ImageLayout, MediaParts, RowImages, Run
from vlm.families.levels import byte_levels

if TYPE_CHECKING:
    import torch

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
MEDIA_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_TOKEN, VIDEO_TOKEN)
# Marks around what is named, and around its box.
MARKUP_TOKENS = (
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
)  # fmt: skip
MAX_ASPECT_RATIO = 200


def target_size(
    parts: MediaParts, height: int, width: int, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """The size nearest to an image's own whose sides are whole merged patches and whose area is within the limits.

    Args:
        parts: Processor pieces.
        height: Height in pixels.
        width: Width in pixels.
        min_pixels: Smallest area; None takes the processor's.
        max_pixels: Largest area; None takes the processor's.

    Returns:
        Height and width in pixels.

    Raises:
        DataError: The image is longer than 200 times its width or the other way round.
    """
    processor = parts.image_processor
    smallest = processor.size["shortest_edge"] if min_pixels is None else min_pixels
    largest = processor.size["longest_edge"] if max_pixels is None else max_pixels
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise too_elongated(height, width)
    return whole_merged_patches(parts, height, width, smallest, largest)


def too_elongated(height: int, width: int) -> DataError:
    """What to raise for an image that the stock processor refuses.

    Args:
        height: Height in pixels.
        width: Width in pixels.
    """
    return DataError(
        f"an image of {height} x {width} pixels is more elongated than 1 : {MAX_ASPECT_RATIO}, which the model's image"
        " processor refuses; crop it or cut it into pieces"
    )


def whole_merged_patches(
    parts: MediaParts, height: int, width: int, smallest: float, largest: float
) -> tuple[int, int]:
    """The nearest size whose sides are whole merged patches and whose area is within limits.

    Args:
        parts: Processor pieces.
        height: Height in pixels.
        width: Width in pixels.
        smallest: Least area in pixels.
        largest: Greatest area in pixels.

    Returns:
        Height and width in pixels.
    """
    factor = parts.image_processor.patch_size * parts.image_processor.merge_size
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > largest:
        shrink = math.sqrt(height * width / largest)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < smallest:
        # A side under half a factor was rounded to 0 above; the area is then 0 and this branch mends it.
        grow = math.sqrt(smallest / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def image_layout(parts: MediaParts, height: int, width: int, *, image_token: str = IMAGE_TOKEN) -> ImageLayout:
    """One image token per merged patch of an image at its target size."""
    processor = parts.image_processor
    factor = processor.patch_size * processor.merge_size
    return (Run(image_token, (height // factor) * (width // factor)),)


def pixel_inputs(parts: MediaParts, images: RowImages) -> dict[str, torch.Tensor]:
    """Patches of all images of the batch, one after the other.

    The same values as the stock processor's, but patches are cut while they are still bytes, and normalisation is a
    look-up of 256 levels per channel: a page takes a fraction of the time.

    Args:
        parts: Processor pieces.
        images: uint8 arrays of shape [height, width, 3] at their target size.

    Returns:
        ``pixel_values`` of shape [patches, channels * temporal * patch * patch] and ``image_grid_thw`` of shape
        [images, 3] (time, rows, columns, in patches); nothing for a batch without images.
    """
    import numpy as np
    import torch

    flat = [image for row in images for image in row]
    if not flat:
        return {}
    processor = parts.image_processor
    patch, merge, repeats = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    grids = [(1, image.shape[0] // patch, image.shape[1] // patch) for image in flat]
    levels = byte_levels(processor)
    values = np.empty((sum(rows * columns for _, rows, columns in grids), 3, repeats, patch * patch), np.float32)
    position = 0
    for image, (_, rows, columns) in zip(flat, grids, strict=True):
        height, width, _ = image.shape
        assert height % (patch * merge) == 0, "images come at their target size"
        assert width % (patch * merge) == 0, "images come at their target size"
        # Patches that are merged into one token follow each other.
        split = image.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
        bytes_ = split.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, patch * patch)
        for channel in range(3):
            values[position : position + rows * columns, channel, 0] = levels[channel][bytes_[:, channel]]
        position += rows * columns
    values[:, :, 1:] = values[:, :, :1]  # a still image is a film of equal frames
    return {
        "pixel_values": torch.from_numpy(values.reshape(len(values), -1)),
        "image_grid_thw": torch.tensor(grids, dtype=torch.int64),
    }


def token_inputs(
    parts: MediaParts, input_ids: torch.Tensor, media: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Marks image tokens (1) and video tokens (2), from which the model derives its three-axis positions.

    Returns:
        ``mm_token_type_ids`` of shape [batch, sequence].
    """
    types = (input_ids == parts.token_id(IMAGE_TOKEN)).long()
    types += 2 * (input_ids == parts.token_id(VIDEO_TOKEN)).long()
    return {"mm_token_type_ids": types}
