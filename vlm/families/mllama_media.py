r"""Image handling of Llama 3.2 Vision: an image in the upper left of a canvas of at most four square tiles.

    image --resize--> fits the best canvas --pad with black--> canvas --cut--> tiles        |tile|tile|
                                                                                           |tile|tile|

What a dataset stores is the resized image without the padding, at a size at which the stock processor would leave it
alone: the canvas found for the stored size is the one found for the image. There is one exception. The short side is
rounded down, and where that takes it from just over a whole number of tiles to exactly that number, the stored size
alone would lead to a smaller canvas. Such an image is stored with one black line of the padding, which restores the
canvas and so all pixel values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vlm.families.areas import within_area
from vlm.families.family import CrossAttention, ImageLayout, MediaParts, RowImages, Run
from vlm.families.pixels import Numbers, PixelBytes

if TYPE_CHECKING:
    import torch
    from PIL import Image

IMAGE_TOKEN = "<|image|>"


def target_size(
    parts: MediaParts, height: int, width: int, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """The size at which an image lies on its canvas.

    Args:
        parts: Processor pieces.
        height: Height in pixels.
        width: Width in pixels.
        min_pixels: Smallest area; None for none, as in the stock processor. Never beyond the largest canvas.
        max_pixels: Largest area; None for none, as in the stock processor. Never below one tile on the longer side. The
            model spends the same on every image, whatever its size.

    Returns:
        Height and width in pixels.
    """
    tile, max_tiles = _tiles(parts)
    height, width = within_area(height, width, min_pixels, max_pixels)
    canvas = _canvas(height, width, tile, max_tiles)
    height, width = _fit(height, width, canvas, tile)
    if _canvas(height, width, tile, max_tiles) == canvas:
        return height, width
    if _canvas(height, width + 1, tile, max_tiles) == canvas:
        return height, width + 1
    assert _canvas(height + 1, width, tile, max_tiles) == canvas, "one line is all that rounding takes away"
    return height + 1, width


def resize(parts: MediaParts, image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes an RGB or grey image to its target size, the last line of which may be padding.

    Args:
        parts: Processor pieces.
        image: In its original size.
        size: What `target_size` gave for it: height and width in pixels.
    """
    import PIL.Image

    tile, _ = _tiles(parts)
    height, width = size
    if (image.height, image.width) == size:
        return image
    inner_height, inner_width = height, width
    if width > tile and (width - 1) % tile == 0 and math.floor(image.width * (height / image.height)) == width - 1:
        inner_width -= 1
    elif height > tile and (height - 1) % tile == 0 and math.floor(image.height * (width / image.width)) == height - 1:
        inner_height -= 1
    resized = image.resize((inner_width, inner_height), resample=parts.image_processor.resample)
    if (inner_height, inner_width) == size:
        return resized
    page = PIL.Image.new(image.mode, (width, height))
    page.paste(resized)
    return page


def image_layout(parts: MediaParts, height: int, width: int) -> ImageLayout:
    """One token, whatever the size."""
    return (Run(IMAGE_TOKEN, 1),)


def pixel_inputs(parts: MediaParts, images: RowImages) -> dict[str, Any]:
    """Tiles of all images, with rows padded to the most images of a row and images padded to the most tiles.

    Args:
        parts: Processor pieces.
        images: For each row of the batch, uint8 arrays of shape [height, width, 3] at their target size.

    Returns:
        ``pixel_values`` of shape [rows, images, tiles, 3, tile, tile], still as bytes, ``aspect_ratio_ids`` of shape
        [rows, images] (0 for padding) and ``aspect_ratio_mask`` of shape [rows, images, tiles]; nothing for a batch without images.
    """
    import torch

    tile, max_tiles = _tiles(parts)
    num_images = max((len(row) for row in images), default=0)
    if num_images == 0:
        return {}
    arrangements = _arrangements(max_tiles)
    ids = torch.zeros((len(images), num_images), dtype=torch.int64)
    mask = torch.zeros((len(images), num_images, max_tiles), dtype=torch.int64)
    mask[:, :, 0] = 1  # the stock processor marks the first tile of padding, too
    places = []
    for row, row_images in enumerate(images):
        for number, image in enumerate(row_images):
            height, width, _ = image.shape
            canvas = _canvas(height, width, tile, max_tiles)
            assert _fit(height, width, canvas, tile) == (height, width), "images come at their target size"
            rows, columns = canvas[0] // tile, canvas[1] // tile
            ids[row, number] = arrangements.index((rows, columns)) + 1
            mask[row, number, : rows * columns] = 1
            places.append((row, number, rows, columns))
    arrange = partial(_tiles_of_rows, shape=(len(images), num_images, max_tiles, 3, tile, tile), places=tuple(places))
    return {
        "pixel_values": PixelBytes.of([image for row in images for image in row], parts.image_processor, arrange),
        "aspect_ratio_ids": ids,
        "aspect_ratio_mask": mask,
    }


def _tiles_of_rows(
    images: Sequence[torch.Tensor],
    numbers: Numbers,
    *,
    shape: tuple[int, ...],
    places: Sequence[tuple[int, int, int, int]],
) -> torch.Tensor:
    """Tiles of each image; `places` has its row, its number in that row, and the rows and columns of its canvas."""
    values, tile = numbers.zeros(*shape), shape[-1]
    for image, (row, number, rows, columns) in zip(images, places, strict=True):
        page = image.new_zeros(rows * tile, columns * tile, 3)
        page[: image.shape[0], : image.shape[1]] = image
        cut = page.view(rows, tile, columns, tile, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, tile, tile)
        values[row, number, : rows * columns] = numbers(cut, 1)
    return values


def token_inputs(
    parts: MediaParts, input_ids: torch.Tensor, media: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Which tiles each position of the text looks at: those of the last image before it.

    Images that follow each other directly are looked at together. Works for padding on either side.

    Returns:
        ``cross_attention_mask`` of shape [batch, sequence, images, tiles]; nothing for a batch without images.
    """
    import torch

    if "aspect_ratio_mask" not in media:
        return {}
    tiles = media["aspect_ratio_mask"]
    num_rows, length = input_ids.shape
    mask = torch.zeros((num_rows, length, *tiles.shape[1:]), dtype=torch.int64)
    for row, is_image in enumerate(input_ids == parts.token_id(IMAGE_TOKEN)):
        positions = is_image.nonzero()[:, 0].tolist()
        end = following = length
        for number in reversed(range(len(positions))):
            if positions[number] + 1 != following:
                end = following
            following = positions[number]
            mask[row, following:end, number] = tiles[row, number]
    return {"cross_attention_mask": mask}


def patches_per_token(config: Mapping[str, Any]) -> int:
    """Positions in the vision tower behind an image's one token, by a model's `config.json`: always those of all tiles."""
    vision = config["vision_config"]
    patches = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2 + 1
    return int(vision.get("max_num_tiles", 4)) * math.ceil(patches / 8) * 8


def cross_attention(config: Mapping[str, Any]) -> CrossAttention:
    """Every fifth layer, if the `config.json` does not say; the tower's mask is a square over all tiles of an image."""
    text = config["text_config"]
    layers = text.get("cross_attention_layers") or range(3, int(text["num_hidden_layers"]), 5)
    return CrossAttention(layers=tuple(layers), mask_values=patches_per_token(config))


def _tiles(parts: MediaParts) -> tuple[int, int]:
    """Side of a tile in pixels, and the most tiles of an image."""
    return int(parts.image_processor.size["height"]), int(parts.image_processor.max_image_tiles)


def _arrangements(max_tiles: int) -> list[tuple[int, int]]:
    """All (rows, columns) of a canvas, in the order that gives them their ids."""
    sides = range(1, max_tiles + 1)
    return [(rows, columns) for rows in sides for columns in sides if rows * columns <= max_tiles]


def _canvas(height: int, width: int, tile: int, max_tiles: int) -> tuple[int, int]:
    """The canvas on which an image has to be enlarged least; else the one for which it has to be shrunk least."""
    canvases = [(rows * tile, columns * tile) for rows, columns in _arrangements(max_tiles)]
    scales = [min(rows / height, columns / width) for rows, columns in canvases]
    enlarging = [scale for scale in scales if scale >= 1]
    chosen = min(enlarging) if enlarging else max(scales)
    fitting = [canvas for canvas, scale in zip(canvases, scales, strict=True) if scale == chosen]
    return min(fitting, key=lambda canvas: canvas[0] * canvas[1])


def _fit(height: int, width: int, canvas: tuple[int, int], tile: int) -> tuple[int, int]:
    """An image's size on its canvas: its own if that fits, at least a tile on one side, its proportions kept."""
    largest_height, largest_width = (
        min(max(own, tile), most) for own, most in zip((height, width), canvas, strict=True)
    )
    scale_height, scale_width = largest_height / height, largest_width / width
    if scale_width < scale_height:
        return min(math.floor(height * scale_width) or 1, largest_height), largest_width
    return largest_height, min(math.floor(width * scale_height) or 1, largest_width)
