"""Image handling of PaddleOCR-VL: sizes as in Qwen2-VL, but single patches in reading order, which the projector merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vlm.families import qwen_media
from vlm.families.family import ImageLayout, MediaParts, RowImages, Run
from vlm.families.pixels import Numbers, PixelBytes

if TYPE_CHECKING:
    import torch

IMAGE_TOKEN = "<|IMAGE_PLACEHOLDER|>"
MEDIA_TOKENS = (IMAGE_TOKEN, "<|IMAGE_START|>", "<|IMAGE_END|>")


def target_size(
    parts: MediaParts, height: int, width: int, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """As Qwen2-VL's, of an image that was first enlarged until its short side is a whole token.

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
    side = parts.image_processor.patch_size * parts.image_processor.merge_size
    new_height, new_width = height, width
    if new_height < side:
        new_height, new_width = side, round(width * side / height)
    if new_width < side:
        new_height, new_width = round(new_height * side / new_width), side
    if max(new_height, new_width) > qwen_media.MAX_ASPECT_RATIO * min(new_height, new_width):
        raise qwen_media.too_elongated(height, width)
    return qwen_media.target_size(parts, new_height, new_width, min_pixels, max_pixels)


def image_layout(parts: MediaParts, height: int, width: int) -> ImageLayout:
    """One image token per square of merged patches of an image at its target size."""
    side = parts.image_processor.patch_size * parts.image_processor.merge_size
    return (Run(IMAGE_TOKEN, (height // side) * (width // side)),)


def pixel_inputs(parts: MediaParts, images: RowImages) -> dict[str, Any]:
    """Patches of all images of the batch, one after the other, each image's row by row.

    Args:
        parts: Processor pieces.
        images: uint8 arrays of shape [height, width, 3] at their target size.

    Returns:
        ``pixel_values`` of shape [patches, 3, patch, patch], still as bytes, and ``image_grid_thw`` of shape [images, 3]
        (time, rows, columns, in patches); nothing for a batch without images.
    """
    import torch

    flat = [image for row in images for image in row]
    if not flat:
        return {}
    patch = parts.image_processor.patch_size
    grids = [(1, image.shape[0] // patch, image.shape[1] // patch) for image in flat]
    for image, (_, rows, columns) in zip(flat, grids, strict=True):
        assert image.shape[:2] == (rows * patch, columns * patch), "images come at their target size"
    return {
        "pixel_values": PixelBytes.of(flat, parts.image_processor, partial(_patches, patch=patch)),
        "image_grid_thw": torch.tensor(grids, dtype=torch.int64),
    }


def _patches(images: Sequence[torch.Tensor], numbers: Numbers, *, patch: int) -> torch.Tensor:
    """Patches of each image row by row."""
    import torch

    cut = []
    for image in images:
        split = image.reshape(image.shape[0] // patch, patch, image.shape[1] // patch, patch, 3)
        cut.append(split.permute(0, 2, 4, 1, 3).reshape(-1, 3, patch, patch))
    return numbers(torch.cat(cut), 1)


def token_inputs(
    parts: MediaParts, input_ids: torch.Tensor, media: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Marks image tokens (1), from which the model derives its three-axis positions.

    Returns:
        ``mm_token_type_ids`` of shape [batch, sequence].
    """
    return {"mm_token_type_ids": (input_ids == parts.token_id(IMAGE_TOKEN)).long()}
