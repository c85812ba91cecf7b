"""Images and videos of notebooks: from whatever a message holds to upright, opaque Pillow images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm.config import DataConfig
from vlm.data.images import MAX_IMAGE_FILE_BYTES, load_image_bytes, open_image, pillow_limit, upright_image
from vlm.data.rows import RowError
from vlm.data.video import MAX_IMAGES_OF_ROW, Medium, VideoReference, load_video
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
        with pillow_limit(MAX_SOURCE_PIXELS):
            return upright_image(open_image(_content(reference, allow_urls), MAX_SOURCE_PIXELS))
    except RowError as error:
        message = error.message.replace("data.allow_urls is off", "allow_urls is off; give allow_urls=True or the file")
        raise DataError(f"an image cannot be used: {message}") from error


def load_medium(
    reference: Any, *, allow_urls: bool, max_video_frames: int | None = None, max_video_pixels: int | None = None
) -> Medium:
    """Loads an image or a video.

    Args:
        reference: An image as in `load_image`, or a `VideoReference`: a list of such images, an array of shape [frames,
            height, width, 3], a folder of images, or an animated file.
        allow_urls: Whether remote addresses may be fetched.
        max_video_frames: Of longer videos, evenly spaced frames are taken; None takes the default of `data`.
        max_video_pixels: Limit on the area of a frame; None takes the default of `data`.

    Raises:
        DataError: It cannot be used.
    """
    if not isinstance(reference, VideoReference):
        return Medium([load_image(reference, allow_urls=allow_urls)])
    value = reference.value
    if isinstance(value, np.ndarray) and value.ndim == 4:
        value = list(value)
    value = str(value).removeprefix("file://") if isinstance(value, Path | str) and _is_path(str(value)) else value
    try:
        with pillow_limit(MAX_SOURCE_PIXELS):
            return load_video(
                replace(reference, value=value),
                load=lambda frame: _content(frame, allow_urls),
                list_folder=_list_folder,
                max_frames=max_video_frames or DataConfig().max_video_frames,
                max_source_pixels=MAX_SOURCE_PIXELS,
                max_pixels=max_video_pixels or DataConfig().max_video_pixels,
                max_total_pixels=MAX_IMAGES_OF_ROW * MAX_SOURCE_PIXELS,
            )
    except RowError as error:
        raise DataError(f"a video cannot be used: {error.message}") from error


def _list_folder(path: str) -> list[str]:
    try:
        return [str(entry) for entry in Path(path).expanduser().iterdir()]
    except OSError as error:
        raise RowError(
            "video_not_found", f"video {path!r}: {error.strerror}; give a list of frames, a folder or an animated file"
        ) from error


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
