"""Image handling of GLM-OCR: that of Qwen2-VL, with other tokens and a processor that counts a still image as two frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlm.families import qwen_media
from vlm.families.family import MediaParts

if TYPE_CHECKING:
    import torch

IMAGE_TOKEN = "<|image|>"
MEDIA_TOKENS = (
    IMAGE_TOKEN,
    "<|video|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)


def target_size(
    parts: MediaParts, height: int, width: int, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """The size that the stock processor resizes to: whole merged patches within its limits.

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
    # Its limits hold for the frames that make a patch together: for a still image, so many copies of it.
    frames = processor.temporal_patch_size
    smallest = processor.size["shortest_edge"] / frames if min_pixels is None else min_pixels
    largest = processor.size["longest_edge"] / frames if max_pixels is None else max_pixels
    if min(height, width) < 1:
        raise qwen_media.too_elongated(height, width)
    new_height, new_width = height, width
    factor = processor.patch_size * processor.merge_size
    if min(height, width) < factor:
        grow = max(factor / height, factor / width)
        new_height, new_width = int(height * grow), int(width * grow)
    if max(new_height, new_width) > qwen_media.MAX_ASPECT_RATIO * min(new_height, new_width):
        raise qwen_media.too_elongated(height, width)
    return qwen_media.whole_merged_patches(parts, new_height, new_width, smallest, largest)


def token_inputs(
    parts: MediaParts, input_ids: torch.Tensor, media: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Marks image tokens (1), from which the model derives its three-axis positions.

    Returns:
        ``mm_token_type_ids`` of shape [batch, sequence].
    """
    return {"mm_token_type_ids": (input_ids == parts.token_id(IMAGE_TOKEN)).long()}
