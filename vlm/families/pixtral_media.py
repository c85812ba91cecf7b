"""Image handling that Pixtral and Mistral 3 share: native resolution, rows of tokens with a break after each.

An image of 2 x 3 tokens stands in the text as ``[IMG][IMG][IMG][IMG_BREAK][IMG][IMG][IMG][IMG_END]``. One token covers
a patch (Pixtral) or, where the projector merges patches, a square of them (Mistral 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlm.errors import DataError
from vlm.families.family import ImageLayout, MediaParts, RowImages, Run
from vlm.families.pixels import Numbers, PixelBytes

if TYPE_CHECKING:
    import torch

IMAGE_TOKEN = "[IMG]"
BREAK_TOKEN = "[IMG_BREAK]"
END_TOKEN = "[IMG_END]"
MEDIA_TOKENS = (IMAGE_TOKEN, BREAK_TOKEN, END_TOKEN)


def pixels_per_token(parts: MediaParts) -> int:
    """Side of the square of pixels behind one image token.

    The processor's own setting counts, and not the image processor's, which it overrides; the defaults are its, too.
    """
    return int(parts.settings.get("patch_size", 16)) * int(parts.settings.get("spatial_merge_size", 1))


def target_size(
    parts: MediaParts, height: int, width: int, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """The size that the stock processor resizes to: within the longest edge, both sides rounded up to whole tokens.

    Args:
        parts: Processor pieces.
        height: Height in pixels.
        width: Width in pixels.
        min_pixels: Smallest area; None for none, as in the stock processor. Never beyond the longest edge.
        max_pixels: Largest area; None for none, as in the stock processor.

    Returns:
        Height and width in pixels.

    Raises:
        DataError: The image is so elongated that its short side would vanish.
    """
    side = pixels_per_token(parts)
    largest_height, largest_width = _largest_sides(parts)
    ratio = max(height / largest_height, width / largest_width)
    new_height, new_width = height, width
    if ratio > 1:
        new_height, new_width = math.floor(height / ratio), math.floor(width / ratio)
    if min(height, width) < 1 or min(new_height, new_width) < 1:
        raise DataError(
            f"an image of {height} x {width} pixels has no height or width left once its long side is"
            f" {max(largest_height, largest_width)}; crop it or cut it into pieces"
        )
    rows, columns = math.ceil(new_height / side), math.ceil(new_width / side)
    if max_pixels is not None and rows * columns * side**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = min(rows, max(1, math.floor(height / shrink / side)))
        columns = min(columns, max(1, math.floor(width / shrink / side)))
    elif min_pixels is not None and rows * columns * side**2 < min_pixels:
        grow = min(math.sqrt(min_pixels / (height * width)), 1 / ratio)
        rows = max(rows, min(math.ceil(height * grow / side), largest_height // side))
        columns = max(columns, min(math.ceil(width * grow / side), largest_width // side))
    return rows * side, columns * side


def image_layout(parts: MediaParts, height: int, width: int) -> ImageLayout:
    """Rows of image tokens with a break behind each; an end in place of the last break."""
    side = pixels_per_token(parts)
    rows, columns = height // side, width // side
    row = (Run(IMAGE_TOKEN, columns), Run(BREAK_TOKEN, 1))
    return (*(row * rows)[:-1], Run(END_TOKEN, 1))


def pixel_inputs(parts: MediaParts, images: RowImages) -> dict[str, Any]:
    """All images of the batch, padded to the largest; the model cuts the padding off again.

    Args:
        parts: Processor pieces.
        images: uint8 arrays of shape [height, width, 3] at their target size.

    Returns:
        ``pixel_values`` of shape [images, 3, height, width], still as bytes, and ``image_sizes`` of shape [images, 2]
        (height, width); nothing for a batch without images.
    """
    import torch

    flat = [image for row in images for image in row]
    if not flat:
        return {}
    sizes = [image.shape[:2] for image in flat]
    side = pixels_per_token(parts)
    assert all(height % side == 0 and width % side == 0 for height, width in sizes), "images come at their target size"
    return {
        "pixel_values": PixelBytes.of(flat, parts.image_processor, _padded),
        "image_sizes": torch.tensor(sizes, dtype=torch.int64),
    }


def _padded(images: Sequence[torch.Tensor], numbers: Numbers) -> torch.Tensor:
    """Images in the upper left of equal frames of zeros."""
    largest = (max(image.shape[0] for image in images), max(image.shape[1] for image in images))
    values = numbers.zeros(len(images), 3, *largest)
    for place, image in zip(values, images, strict=True):
        place[:, : image.shape[0], : image.shape[1]] = numbers(image.permute(2, 0, 1), 0)
    return values


def token_inputs(
    parts: MediaParts, input_ids: torch.Tensor, media: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Nothing: ids and pixels are all that these models take."""
    return {}


def _largest_sides(parts: MediaParts) -> tuple[int, int]:
    size = parts.image_processor.size
    if size.longest_edge:
        return int(size.longest_edge), int(size.longest_edge)
    return int(size.height), int(size.width)
