"""Image handling that both DeepSeek-OCR models share: one global view of the page, and crops of it where it is large.

    page 900 x 1300  --fit and pad-->  global view 1024 x 1024 (grey around)
                     --stretch------>  grid of tiles, here 1 x 2, each cut out as a crop of 640 x 640

Both views are made from the page itself, so it is stored at its own size, and the views when a batch is made. The
order of a page's tokens is the model's affair; each stands as one image token here, and only their number matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vlm.errors import DataError
from vlm.families.areas import within_area
from vlm.families.family import ImageLayout, MediaParts, RowImages, Run
from vlm.families.pixels import PixelBytes, stacked
from vlm.families.tiles import cut_tiles, nearest_grid

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

IMAGE_TOKEN = "<image>"
MEDIA_TOKENS = (IMAGE_TOKEN,)
# A question asks for boxes with the first; an answer has a box's name and its corners between the others.
MARKUP_TOKENS = ("<|grounding|>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>")
# Sides of a patch of the first encoder in pixels, and how many of them become one token, where no file says.
_PATCH_SIZE, _DOWNSAMPLE_RATIO = 16, 4

# The layout called "plain" that these models were trained on: no roles, the answer follows the question, and an end
# token follows the answer. White space behind a question is dropped, as the publishers' own code does: as a token of
# its own it would keep the answer's first word from being cut as in the middle of a text.
PLAIN_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set parts = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set parts.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set parts.text = parts.text + '<image>\\n' -%}
{%- elif part['type'] == 'text' -%}
{%- set parts.text = parts.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{{- parts.text + eos_token -}}
{%- elif message['role'] == 'system' -%}
{{- parts.text.rstrip() + '\\n\\n' -}}
{%- else -%}
{{- parts.text.rstrip() -}}
{%- endif -%}
{%- endfor -%}
"""


def target_size(
    parts: MediaParts, height: int, width: int, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """An image's own size, or the nearest one of the same shape whose area is within the limits that are given.

    Args:
        parts: Processor pieces.
        height: Height in pixels.
        width: Width in pixels.
        min_pixels: Smallest area; None for no limit.
        max_pixels: Largest area; None for no limit.

    Returns:
        Height and width in pixels.

    Raises:
        DataError: The image is so elongated that a view of it would be less than a pixel wide.
    """
    if min(height, width) < 1 or max(height, width) > parts.image_processor.size["height"] * min(height, width):
        raise DataError(
            f"an image of {height} x {width} pixels is so elongated that the model would see a line less than a pixel wide;"
            " crop it or cut it into pieces"
        )
    return within_area(height, width, min_pixels, max_pixels)


def tile_grid(processor: Any, height: int, width: int) -> tuple[int, int] | None:
    """Columns and rows of crops that an image is cut into; None where the global view alone is used.

    Args:
        processor: Image processor with `tile_size`, `min_patches`, `max_patches` and `crop_to_patches`.
        height: Height in pixels.
        width: Width in pixels.
    """
    tile = processor.tile_size
    if not processor.crop_to_patches or max(height, width) <= tile:
        return None
    return nearest_grid(height, width, tile, processor.min_patches, processor.max_patches)


def rows_with_breaks_layout(parts: MediaParts, height: int, width: int) -> ImageLayout:
    """DeepSeek-OCR: every row of tokens of a view ends with a break, and one separator stands between the views."""
    processor = parts.image_processor
    side = _tokens_per_side(parts, processor.size["height"])
    count = side * (side + 1) + 1
    grid = tile_grid(processor, height, width)
    if grid is not None:
        tile_side = _tokens_per_side(parts, processor.tile_size)
        columns, rows = grid
        count += rows * tile_side * (columns * tile_side + 1)
    return (Run(IMAGE_TOKEN, count),)


def queries_layout(parts: MediaParts, height: int, width: int) -> ImageLayout:
    """DeepSeek-OCR 2: a fixed number of queries per view, without breaks, and one separator."""
    processor = parts.image_processor
    count = _tokens_per_side(parts, processor.size["height"]) ** 2 + 1
    grid = tile_grid(processor, height, width)
    if grid is not None:
        count += grid[0] * grid[1] * _tokens_per_side(parts, processor.tile_size) ** 2
    return (Run(IMAGE_TOKEN, count),)


def _tokens_per_side(parts: MediaParts, side: int) -> int:
    patch = parts.settings.get("patch_size", _PATCH_SIZE)
    return math.ceil(side // patch / parts.settings.get("downsample_ratio", _DOWNSAMPLE_RATIO))


def pixel_inputs(
    parts: MediaParts, images: RowImages, *, with_grids: bool, global_view: Callable[[Any, Image.Image], np.ndarray]
) -> dict[str, Any]:
    """Global views and crops of all images of the batch, each kind one after the other.

    Args:
        parts: Processor pieces.
        images: uint8 arrays of shape [height, width, 3].
        with_grids: Give the grids too, which a model with breaks between rows needs.
        global_view: Makes the global view of a page.

    Returns:
        ``pixel_values`` of shape [images, 3, size, size] and, where there are crops, ``pixel_values_local`` of shape [crops,
        3, tile, tile], both still as bytes; ``num_local_patches``, the number of crops of each image, and with grids
        ``patches_grid``, their [columns, rows], as plain lists; nothing for a batch without images.
    """
    import numpy as np
    from PIL import Image

    processor = parts.image_processor
    tile = processor.tile_size
    views: list[np.ndarray] = []
    crops: list[np.ndarray] = []
    counts, grids = [], []
    for array in (array for row in images for array in row):
        page = Image.fromarray(np.ascontiguousarray(array))
        views.append(global_view(processor, page))
        grid = tile_grid(processor, page.height, page.width)
        counts.append(0 if grid is None else grid[0] * grid[1])
        grids.append([1, 1] if grid is None else list(grid))
        if grid is not None:
            crops.extend(cut_tiles(processor, page, grid, tile))
    if not views:
        return {}
    inputs: dict[str, Any] = {"pixel_values": PixelBytes.of(views, processor, stacked), "num_local_patches": counts}
    if crops:
        inputs["pixel_values_local"] = PixelBytes.of(crops, processor, stacked)
    if with_grids:
        inputs["patches_grid"] = grids
    return inputs


def padded_like_pillow(processor: Any, page: Image.Image) -> np.ndarray:
    """DeepSeek-OCR's global view, made with Pillow's own function, as its publishers do.

    Args:
        processor: Image processor.
        page: An RGB image.

    Returns:
        uint8 array of shape [size, size, 3].
    """
    import numpy as np
    from PIL import ImageOps

    size = processor.size["height"]
    view = ImageOps.pad(page, (size, size), processor.resample, color=tuple(processor.background_color))
    return np.asarray(view)


def padded_like_stock(processor: Any, page: Image.Image) -> np.ndarray:
    """DeepSeek-OCR 2's global view, as transformers makes it; an odd margin goes to the other side than in Pillow.

    Args:
        processor: Image processor.
        page: An RGB image.

    Returns:
        uint8 array of shape [size, size, 3].
    """
    import numpy as np

    size = processor.size["height"] if processor.crop_to_patches else processor.tile_size
    scale = size / max(page.height, page.width)
    height, width = round(page.height * scale), round(page.width * scale)
    view = np.empty((size, size, 3), np.uint8)
    view[:] = processor.background_color
    top, left = (size - height) // 2, (size - width) // 2
    view[top : top + height, left : left + width] = page.resize((width, height), processor.resample)
    return view


def token_inputs(parts: MediaParts, input_ids: torch.Tensor, media: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """These models need nothing beside ids and pixels."""
    return {}


def cast_pixels(model: Any) -> None:
    """Lets the vision tower take float32 pixels in whatever precision its weights are.

    Processors give float32, and this family's towers, unlike others, hand it to the first convolution as it is.

    Args:
        model: A live model, changed in place.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 3:
            module.register_forward_pre_hook(_cast_to_weight)


def _cast_to_weight(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    pixels, *others = args
    return (pixels.to(module.weight.dtype), *others)
