"""Shrinking images before the model's own processor sees them, as notebooks ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from vlm.errors import ConfigError

# For models that take images of any size, and so name none.
_ANY_SIZE_LENGTH = 512
_DIMENSIONS = (0, 1, "max", "min")


class Resizing:
    """One rule for all images of a training.

    Args:
        resize: ``"max"`` leaves images to the model's own limits; ``"min"`` shrinks them to the model's image size (512
            for models that take any); a number is that size; a pair is an exact (width, height).
        dimension: Which side the size is about: 0 the width, 1 the height, ``"max"`` the longer, ``"min"`` the shorter.
        config: The model's configuration as a mapping.

    Raises:
        ConfigError: A value is unknown.
    """

    def __init__(self, resize: Any, dimension: Any, config: Mapping[str, Any]) -> None:
        if dimension not in _DIMENSIONS:
            raise ConfigError(f"resize_dimension {dimension!r} is unknown; use 0, 1, 'max' or 'min'")
        self._dimension = dimension
        self._exact: tuple[int, int] | None = None
        self._length: int | None = None
        if isinstance(resize, list | tuple) and len(resize) == 2 and all(_is_length(side) for side in resize):
            self._exact = (int(resize[0]), int(resize[1]))
        elif resize == "min":
            self._length = _model_length(config)
        elif _is_length(resize):
            self._length = int(resize)
        elif resize != "max":
            raise ConfigError(f"resize {resize!r} is unknown; use 'max', 'min', a length in pixels, or (width, height)")
        if self._length is None and dimension != 0:
            raise ConfigError(
                f"resize_dimension={dimension!r} has no effect with resize={resize!r}; it belongs to 'min' or a length"
            )

    def __call__(self, image: Image.Image) -> Image.Image:
        """Resizes one image; never enlarges it unless an exact size is asked for."""
        size = image.size
        if self._exact is not None:
            size = self._exact
        elif self._length is not None:
            side = {0: image.width, 1: image.height, "max": max(image.size), "min": min(image.size)}[self._dimension]
            if side > self._length:
                scale = self._length / side
                size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _model_length(config: Mapping[str, Any]) -> int:
    size = (config.get("vision_config") or {}).get("image_size")
    if isinstance(size, list | tuple):
        size = max(size)
    return int(size) if size else _ANY_SIZE_LENGTH
