"""Images of notebooks: from whatever a message holds to an upright, opaque Pillow image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.images import MAX_IMAGE_FILE_BYTES, load_image_bytes, open_image, pillow_limit_off, upright_image
from vlm.data.rows import RowError
from vlm.errors import DataError

MAX_SOURCE_PIXELS = 100_000_000


def load_image(reference: Any, *, allow_urls: bool) -> Image.Image:
    """Loads one image; the header is checked before any pixel is decoded.

    Args:
        reference: A Pillow image (left as it is), a uint8 array of shape [height, width, 3] or [height, width], bytes, a
            dictionary with ``bytes`` or ``path``, a path of this machine, a ``data:`` URI, or a remote address.
        allow_urls: Whether remote addresses may be fetched.

    Returns:
        An image of mode L or RGB.

    Raises:
        DataError: It is missing, damaged, too large, or an address although those are not allowed.
    """
    try:
        with pillow_limit_off():
            return upright_image(open_image(_content(reference, allow_urls), MAX_SOURCE_PIXELS))
    except RowError as error:
        message = error.message.replace("data.allow_urls is off", "allow_urls is off; give allow_urls=True or the file")
        raise DataError(f"an image cannot be used: {message}") from error


def _content(reference: Any, allow_urls: bool) -> bytes | Image.Image:
    if isinstance(reference, Image.Image):
        return reference.copy()  # what follows turns it upright in place, and it is the user's
    if isinstance(reference, np.ndarray):
        if reference.dtype != np.uint8 or reference.ndim not in (2, 3):
            raise RowError(
                "image_type",
                f"an array of {reference.dtype} and shape {list(reference.shape)} is no image; give uint8 of shape"
                " [height, width, 3]",
            )
        return Image.fromarray(reference)
    if isinstance(reference, dict) and not reference.get("bytes"):
        reference = reference.get("path")
    if isinstance(reference, Path) or (isinstance(reference, str) and _is_path(reference)):
        return _read(Path(str(reference).removeprefix("file://")).expanduser())
    return load_image_bytes(reference, None, allow_urls=allow_urls)


def _is_path(text: str) -> bool:
    return text.startswith("file://") or not (text.startswith("data:") or "://" in text)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            data = handle.read(MAX_IMAGE_FILE_BYTES + 1)
    except OSError as error:
        raise RowError(
            "image_unreadable", f"image file {str(path)!r}: {error.strerror}; give the path of an image"
        ) from error
    if len(data) > MAX_IMAGE_FILE_BYTES:
        raise RowError("image_file_too_large", f"image file {str(path)!r} is over {MAX_IMAGE_FILE_BYTES >> 20} MiB")
    return data
