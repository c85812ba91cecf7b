"""Image handling that the Qwen-VL models share: native resolution, patches merged 2 x 2, one token each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vlm.errors import DataError
from vlm.families.family import ImageLayout, MediaParts, RowImages, Run
from vlm.families.pixels import Numbers, PixelBytes

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


def pixel_inputs(parts: MediaParts, images: RowImages) -> dict[str, Any]:
    """Patches of all images of the batch, one after the other.

    Args:
        parts: Processor pieces.
        images: uint8 arrays of shape [height, width, 3] at their target size.

    Returns:
        ``pixel_values`` of shape [patches, channels * temporal * patch * patch], still as bytes, and ``image_grid_thw``
        of shape [images, 3] (time, rows, columns, in patches); nothing for a batch without images.
    """
    import torch

    flat = [image for row in images for image in row]
    if not flat:
        return {}
    processor = parts.image_processor
    patch, merge = processor.patch_size, processor.merge_size
    for image in flat:
        assert image.shape[0] % (patch * merge) == 0, "images come at their target size"
        assert image.shape[1] % (patch * merge) == 0, "images come at their target size"
    grids = [(1, image.shape[0] // patch, image.shape[1] // patch) for image in flat]
    arrange = partial(_patches, patch=patch, merge=merge, repeats=processor.temporal_patch_size)
    return {
        "pixel_values": PixelBytes.of(flat, processor, arrange),
        "image_grid_thw": torch.tensor(grids, dtype=torch.int64),
    }


def _patches(images: Sequence[torch.Tensor], numbers: Numbers, *, patch: int, merge: int, repeats: int) -> torch.Tensor:
    """Patches that are merged into one token follow each other; within a patch: channel, frame, row, column."""
    import torch

    cut = []
    for image in images:
        rows, columns = image.shape[0] // (patch * merge), image.shape[1] // (patch * merge)
        split = image.reshape(rows, merge, patch, columns, merge, patch, 3)
        cut.append(split.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, 1, patch * patch))
    values = numbers(torch.cat(cut), 1)
    return values.expand(-1, -1, repeats, -1).reshape(len(values), -1)  # a still image is a film of equal frames


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
