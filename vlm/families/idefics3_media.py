r"""Image handling that Idefics3 and SmolVLM share: an image cut into square tiles, and the whole of it as one more.

    image --resize--> longest edge --stretch--> canvas of whole tiles --cut--> tiles     |1,1|1,2|1,3|     |global|
                                                       \----------shrink----> global     |2,1|2,2|2,3|

In the text each tile has a label with its row and column, each row ends with a line break, and the global image comes
last. Where the canvas is a single tile, that is the global image, and there are no others.

These models enlarge small images, too, so a canvas can be a hundred times as large as its image. A dataset stores
whichever of the two is smaller. Stored sides that are all whole tiles mean a canvas; an image that has such sides by
chance is stored as its canvas. So is one with a limit on its area, which allows fewer tiles than the longest edge does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vlm.errors import ModelError
from vlm.families.family import ImageLayout, MediaParts, RowImages, Run
from vlm.families.pixels import Numbers, PixelBytes, stacked

if TYPE_CHECKING:
    import torch
    from PIL import Image

IMAGE_TOKEN = "<image>"
AROUND_TOKEN = "<fake_token_around_image>"
GLOBAL_LABEL = "<global-img>"
# Tokenizers that have labels as tokens have those of six rows and columns; elsewhere labels are plain text.
_LABELS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_NO_LABEL = "<row_0_col_0>"
MEDIA_TOKENS = (IMAGE_TOKEN, AROUND_TOKEN, GLOBAL_LABEL, *_LABELS)
# No side of a resized image is longer, whatever the settings say.
_MAX_EDGE = 4096


def target_size(
    parts: MediaParts, height: int, width: int, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """The size of an image's canvas, or its own where that is smaller and the canvas follows from it.

    Args:
        parts: Processor pieces.
        height: Height in pixels.
        width: Width in pixels.
        min_pixels: Nothing to these models, which enlarge every image to the longest edge.
        max_pixels: Largest area of the canvas: its longer side has as many tiles as fit, at least one. None for the
            processor's longest edge alone.

    Returns:
        Height and width in pixels.
    """
    tile = _tile(parts)
    canvas = full = _canvas(parts, height, width, _longest_edge(parts))
    num_tiles = max(full) // tile
    while max_pixels is not None and canvas[0] * canvas[1] > max_pixels and num_tiles > 1:
        num_tiles -= 1
        canvas = _canvas(parts, height, width, num_tiles * tile)
    if canvas == full and not _is_canvas(parts, height, width) and height * width < canvas[0] * canvas[1]:
        return height, width
    return canvas


def resize(parts: MediaParts, image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes an image to its target size, in the two steps of the stock processor.

    Args:
        parts: Processor pieces.
        image: In its original size.
        size: What `target_size` gave for it: height and width in pixels.
    """
    if not _is_canvas(parts, *size):
        return image  # stored at its own size
    edge = _longest_edge(parts)
    if _canvas(parts, image.height, image.width, edge) != size:
        edge = max(size)  # a limit on the area left fewer tiles
    height, width = _within_edge(image.height, image.width, edge)
    resample = parts.image_processor.resample
    return image.resize((width, height), resample).resize((size[1], size[0]), resample)


def image_layout(parts: MediaParts, height: int, width: int) -> ImageLayout:
    """Rows of labelled tiles, then the global image; marks around each."""
    tile = _tile(parts)
    if not _is_canvas(parts, height, width):
        height, width = _canvas(parts, height, width, _longest_edge(parts))
    rows, columns = height // tile, width // tile
    seen = Run(IMAGE_TOKEN, int(parts.settings.get("image_seq_len", 169)))
    around = Run(AROUND_TOKEN, 1)
    end = (around, _label(parts, GLOBAL_LABEL), seen, around)
    if rows == columns == 1:
        return end
    pieces: list[str | Run] = []
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            pieces += [around, _label(parts, f"<row_{row}_col_{column}>"), seen]
        pieces.append("\n")
    return (*pieces, "\n", *end)


def pixel_inputs(parts: MediaParts, images: RowImages) -> dict[str, Any]:
    """Tiles of all images, with rows padded to the most tiles of a row.

    Padding is zero throughout, by which the model finds it; all else are whole tiles, so it needs no mask.

    Args:
        parts: Processor pieces.
        images: For each row of the batch, uint8 arrays of shape [height, width, 3] at their target size.

    Returns:
        ``pixel_values`` of shape [rows, tiles, 3, tile, tile], still as bytes; nothing for a batch without images.
    """
    import numpy as np
    from PIL import Image

    tile = _tile(parts)
    resample = parts.image_processor.resample
    frames: list[list[np.ndarray]] = []
    for row_images in images:
        frames.append([])
        for array in row_images:
            page = Image.fromarray(np.ascontiguousarray(array))
            if not _is_canvas(parts, page.height, page.width):
                page = resize(parts, page, _canvas(parts, page.height, page.width, _longest_edge(parts)))
            rows, columns = page.height // tile, page.width // tile
            if rows * columns > 1:
                cut = np.asarray(page).reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
                frames[-1].extend(cut.reshape(-1, tile, tile, 3))
            frames[-1].append(np.asarray(page.resize((tile, tile), resample)))
    num_frames = max((len(row) for row in frames), default=0)
    if num_frames == 0:
        return {}
    arrange = partial(
        _tiles_of_rows, shape=(len(frames), num_frames, 3, tile, tile), counts=tuple(len(row) for row in frames)
    )
    return {"pixel_values": PixelBytes.of([frame for row in frames for frame in row], parts.image_processor, arrange)}


def _tiles_of_rows(
    frames: Sequence[torch.Tensor], numbers: Numbers, *, shape: tuple[int, ...], counts: Sequence[int]
) -> torch.Tensor:
    """Tiles row by row of the batch, of which each has `counts`; what is left over is padding."""
    values, start = numbers.zeros(*shape), 0
    tiles = stacked(frames, numbers)
    for row, count in zip(values, counts, strict=True):
        row[:count] = tiles[start : start + count]
        start += count
    return values


def token_inputs(
    parts: MediaParts, input_ids: torch.Tensor, media: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Nothing: ids and pixels are all that these models take."""
    return {}


def patches_per_token(config: Mapping[str, Any]) -> int:
    """Positions in the vision tower behind an image token, by a model's `config.json`."""
    return int(config.get("scale_factor", 2)) ** 2


def _tile(parts: MediaParts) -> int:
    """Side of a tile in pixels."""
    return int(parts.image_processor.max_image_size["longest_edge"])


def _longest_edge(parts: MediaParts) -> int | None:
    """The longer side that every image is resized to, in pixels; None where images keep their own."""
    processor = parts.image_processor
    if not processor.do_resize:
        return None
    if not processor.size.get("longest_edge"):
        raise ModelError(
            f"the image processor has size {dict(processor.size)}, but images are cut into tiles by their longest edge;"
            ' give {"longest_edge": pixels} in preprocessor_config.json'
        )
    return int(processor.size["longest_edge"])


def _is_canvas(parts: MediaParts, height: int, width: int) -> bool:
    tile = _tile(parts)
    return height % tile == 0 and width % tile == 0


def _within_edge(height: int, width: int, edge: int | None) -> tuple[int, int]:
    """The first step: the longer side becomes `edge`, the other one an even number."""
    if edge is None:
        return height, width
    ratio = width / height
    if width >= height:
        height, width = int(edge / ratio), edge
        height += height % 2
    else:
        height, width = edge, int(edge * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    if max(height, width) > _MAX_EDGE:
        ratio = width / height
        if width >= height:
            return max(int(_MAX_EDGE / ratio), 1), _MAX_EDGE
        return _MAX_EDGE, max(int(_MAX_EDGE * ratio), 1)
    return height, width


def _canvas(parts: MediaParts, height: int, width: int, edge: int | None) -> tuple[int, int]:
    """Size of the canvas of an image: both sides rounded up to whole tiles, first the longer one."""
    tile = _tile(parts)
    if not parts.image_processor.do_image_splitting:
        return tile, tile
    height, width = _within_edge(height, width, edge)
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        return math.ceil(int(width / ratio) / tile) * tile, width
    height = math.ceil(height / tile) * tile
    return height, math.ceil(int(height * ratio) / tile) * tile


def _label(parts: MediaParts, label: str) -> str | Run:
    """A label as the token it is, or as text where the tokenizer has no such token."""
    return label if parts.token_id(label) == parts.token_id(_NO_LABEL) else Run(label, 1)
