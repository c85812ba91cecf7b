"""A page cut into square tiles, for families whose towers see squares of one size."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


def nearest_grid(height: int, width: int, tile: int, smallest: int, largest: int) -> tuple[int, int]:
    """The grid of tiles whose shape is nearest to an image's.

    Of grids that are equally near, a larger one comes in where the image has more than half of its pixels; so small
    images are not blown up.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        tile: Side of a tile in pixels.
        smallest: Least number of tiles.
        largest: Greatest number of tiles.

    Returns:
        Columns and rows.
    """
    best, best_distance = (1, 1), math.inf
    for columns, rows in _grids(smallest, largest):
        distance = abs(width / height - columns / rows)
        if distance < best_distance or (
            distance == best_distance and height * width > 0.5 * tile * tile * columns * rows
        ):
            best, best_distance = (columns, rows), distance
    return best


@functools.cache
def _grids(smallest: int, largest: int) -> tuple[tuple[int, int], ...]:
    """(columns, rows) of every grid with a number of tiles in the range, fewest tiles first, then fewest columns."""
    sides = range(1, largest + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if smallest <= columns * rows <= largest]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])))


def cut_tiles(processor: Any, page: Image.Image, grid: tuple[int, int], tile: int) -> np.ndarray:
    """Stretches a page to a grid and cuts it.

    Args:
        processor: Image processor, whose filter is used.
        page: An RGB image.
        grid: Columns and rows.
        tile: Side of a tile in pixels.

    Returns:
        uint8 array of shape [tiles, tile, tile, 3], row by row.
    """
    import numpy as np

    columns, rows = grid
    stretched = np.asarray(page.resize((columns * tile, rows * tile), processor.resample))
    cut = stretched.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
    return cut.reshape(rows * columns, tile, tile, 3)
