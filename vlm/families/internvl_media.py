"""Image handling of InternVL: tiles of one size, and behind them the whole page as one more, its thumbnail.

    page 900 x 1300  --stretch-->  2 x 3 tiles of 448 x 448, cut
                     --stretch-->  thumbnail of 448 x 448; none behind a single tile

All views are made from the page itself, so it is stored at its own size, and the views when a batch is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlm.families.areas import within_area
from vlm.families.family import ImageLayout, MediaParts, RowImages, Run
from vlm.families.pixels import PixelBytes, stacked
from vlm.families.tiles import cut_tiles, nearest_grid

if TYPE_CHECKING:
    import numpy as np
    import torch

IMAGE_TOKEN = "<IMG_CONTEXT>"
START_TOKEN, END_TOKEN = "<img>", "</img>"
MEDIA_TOKENS = (IMAGE_TOKEN, START_TOKEN, END_TOKEN, "<video>")
# An answer has a thing's name between the first two, its corners between the others.
MARKUP_TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
# Tokens of a tile, where no file says.
_TOKENS_PER_TILE = 256


def target_size(
    parts: MediaParts, height: int, width: int, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """An image's own size, or the nearest one of the same shape whose area is within the limits that are given.

    The number of tiles follows the image's shape more than its size: limits save storage, hardly ever tokens.

    Args:
        parts: Processor pieces.
        height: Height in pixels.
        width: Width in pixels.
        min_pixels: Smallest area; None for no limit.
        max_pixels: Largest area; None for no limit.

    Returns:
        Height and width in pixels.
    """
    return within_area(height, width, min_pixels, max_pixels)


def image_layout(parts: MediaParts, height: int, width: int) -> ImageLayout:
    """A run of tokens for all views together, between a start and an end."""
    columns, rows = _grid(parts.image_processor, height, width)
    views = columns * rows + (columns * rows > 1)
    count = views * int(parts.settings.get("image_seq_length", _TOKENS_PER_TILE))
    return (START_TOKEN, Run(IMAGE_TOKEN, count), END_TOKEN)


def pixel_inputs(parts: MediaParts, images: RowImages) -> dict[str, Any]:
    """Views of all images of the batch, one after the other.

    Args:
        parts: Processor pieces.
        images: uint8 arrays of shape [height, width, 3].

    Returns:
        ``pixel_values`` of shape [views, 3, tile, tile], still as bytes; nothing for a batch without images.
    """
    import numpy as np
    from PIL import Image

    processor = parts.image_processor
    tile = _side(processor)
    views: list[np.ndarray] = []
    for array in (array for row in images for array in row):
        page = Image.fromarray(np.ascontiguousarray(array))
        grid = _grid(processor, page.height, page.width)
        views.extend(cut_tiles(processor, page, grid, tile))
        if grid != (1, 1):
            views.extend(cut_tiles(processor, page, (1, 1), tile))
    return {"pixel_values": PixelBytes.of(views, processor, stacked)} if views else {}


def token_inputs(parts: MediaParts, input_ids: torch.Tensor, media: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Nothing: ids and pixels are all that these models take."""
    return {}


def patches_per_token(config: Mapping[str, Any]) -> int:
    """Positions in the vision tower behind a media token, by a model's `config.json`: squares of them become one."""
    return round(1 / float(config.get("downsample_ratio", 0.5))) ** 2


def _side(processor: Any) -> int:
    return int(processor.size["height"])


def _grid(processor: Any, height: int, width: int) -> tuple[int, int]:
    """Columns and rows of tiles. The stock processor cuts whatever the image processor's own `crop_to_patches` says."""
    return nearest_grid(height, width, _side(processor), processor.min_patches, processor.max_patches)
