"""Image handling that Qwen2-VL and Qwen2.5-VL share: native resolution, patches merged 2 x 2, one token each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlm.errors import DataError
from vlm.families.family import ImageLayout, MediaParts, RowImages, Run

if TYPE_CHECKING:
    import torch

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
MEDIA_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_TOKEN, VIDEO_TOKEN)
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
    factor = processor.patch_size * processor.merge_size
    smallest = processor.size["shortest_edge"] if min_pixels is None else min_pixels
    largest = processor.size["longest_edge"] if max_pixels is None else max_pixels
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise DataError(
            f"an image of {height} x {width} pixels is more elongated than 1 : {MAX_ASPECT_RATIO}, which the model's image"
            " processor refuses; crop it or cut it into pieces"
        )
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


def image_layout(parts: MediaParts, height: int, width: int) -> ImageLayout:
    """One image token per merged patch of an image at its target size."""
    processor = parts.image_processor
    factor = processor.patch_size * processor.merge_size
    return (Run(IMAGE_TOKEN, (height // factor) * (width // factor)),)


def pixel_inputs(parts: MediaParts, images: RowImages) -> dict[str, torch.Tensor]:
    """Patches of all images of the batch, one after the other.

    Returns:
        ``pixel_values`` of shape [patches, channels * temporal * patch * patch] and ``image_grid_thw`` of shape
        [images, 3] (time, rows, columns, in patches); nothing for a batch without images.
    """
    flat = [image for row in images for image in row]
    if not flat:
        return {}
    features = parts.image_processor(
        images=flat, do_resize=False, input_data_format="channels_last", return_tensors="pt"
    )
    return {"pixel_values": features["pixel_values"], "image_grid_thw": features["image_grid_thw"]}


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
