"""Limits on an image's area that keep its shape, for families whose sizes are free."""

from __future__ import annotations

import math


def within_area(height: int, width: int, min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
    """A size itself, or the nearest of the same shape whose area is within the limits.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        min_pixels: Smallest area; None for no limit.
        max_pixels: Largest area; None for no limit. No side falls below a pixel for it.

    Returns:
        Height and width in pixels.
    """
    area = height * width
    if max_pixels is not None and area > max_pixels:
        scale = math.sqrt(max_pixels / area)
        return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
    if min_pixels is not None and area < min_pixels:
        scale = math.sqrt(min_pixels / area)
        return math.ceil(height * scale), math.ceil(width * scale)
    return height, width
