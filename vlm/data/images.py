"""From an image reference to pixels: found inside its folder, bounded by its header, upright, opaque, 8 bits a channel.

reference -> load_image_bytes -> open_image (header checks) -> upright_image (decode)
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import posixpath
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm.data.locations import IMAGE_SUFFIXES, is_local, leads_outside
from vlm.data.remote import fetch_remote
from vlm.data.rows import RowError

ALLOWED_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_IMAGE_FILE_BYTES = 512 << 20
# Qwen's image processors refuse anything narrower, and no text is readable in such a strip once it is resized.
MAX_ASPECT_RATIO = 200

# Where a JPEG can say that it lies on its side; looking into an absent EXIF block takes a tenth of a small line's time.
_JPEG_TURNED_BY = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})

# What Pillow's decoders raise on damaged data, depending on the format and on where the damage lies.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)


# What Pillow says of sizes above its limit; a warning where those are errors.
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# The same of file systems and archives: what is damaged, encrypted, or packed in an unknown way.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class ImageFolder:
    """Where a stream's image paths lead.

    Symbolic links count by where they lead: a folder that was unpacked or cloned may hold links that somebody else made.

    Attributes:
        fs: File system.
        base: Folder that relative paths start from.
        root: Folder that no path may leave.
        follow_links: Whether links may leave it all the same.
    """

    fs: Any
    base: str
    root: str
    follow_links: bool = False

    @classmethod
    def of_hub(cls, name: str) -> ImageFolder:
        """The place of a Hub dataset's loose files, opened only when a row names one."""
        return cls(None, f"hf://datasets/{name}", f"hf://datasets/{name}")

    def locate(self, path: str) -> str:
        """Path on the file system.

        Raises:
            RowError: If the path leaves the folder or does not end like an image.
        """
        if posixpath.splitext(path.lower())[1] not in IMAGE_SUFFIXES:
            raise RowError(
                "image_suffix", f"image path {path!r} does not end like an image (.png, .jpg, .webp, …)", path=path
            )
        return self._inside(path)

    def list_folder(self, path: str) -> list[str]:
        """Paths of the files in a folder, each as `locate` takes it.

        Raises:
            RowError: If the folder leaves this one or is not there.
        """
        try:
            entries = self.fs.ls(self._inside(path), detail=True) if self.fs is not None else []
        except (OSError, ValueError, KeyError) as error:
            raise RowError(
                "video_not_found",
                f"video {path!r} is neither a folder in the source's folder nor an animated file",
                path=path,
            ) from error
        names = [str(entry["name"]).rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file"]
        return [posixpath.join(path, name) for name in names]

    def _inside(self, path: str) -> str:
        joined = posixpath.normpath(posixpath.join(self.base, path.removeprefix("file://")))
        root = posixpath.normpath(self.root) if self.root else ""
        inside = (
            joined.startswith(root.rstrip("/") + "/")
            if root.strip("/.")
            else not (joined.startswith("..") or posixpath.isabs(path))
        )
        if not inside:
            raise RowError(
                "image_outside",
                f"image path {path!r} leaves the source's folder; only files beneath it are read",
                path=path,
            )
        if not self.follow_links and self.fs is not None and is_local(self.fs) and leads_outside(joined, root or "."):
            raise RowError(
                "image_outside",
                f"image path {path!r} leads out of the source's folder by a symbolic link; put the files there, or set"
                " data.follow_links if you know where its links lead",
                path=path,
            )
        return joined


@contextmanager
def pillow_limit(max_source_pixels: int) -> Iterator[None]:
    """Has Pillow apply our limit where only it sees a size, such as in later frames of an animation; there it doubles it.

    Args:
        max_source_pixels: Most pixels of an image.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_source_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def pillow_quiet() -> Iterator[None]:
    """Keeps Pillow's warnings about odd files to itself: what cannot be used is in the ledger. Not for several threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def is_missing(value: Any) -> bool:
    """Whether a cell holds no image at all, which is allowed: such rows are text only."""
    if value is None or (isinstance(value, str | bytes) and not value):
        return True
    return isinstance(value, dict) and not value.get("bytes") and not value.get("path")


def load_image_bytes(value: Any, folder: ImageFolder | None, *, allow_urls: bool) -> bytes | Image.Image:
    """Fetches what a reference stands for.

    Args:
        value: Bytes, ``{"bytes", "path"}``, a path, a ``data:`` URI, a remote address, or a Pillow image.
        folder: Where paths lead; None if the source has no folder.
        allow_urls: Whether remote addresses may be fetched.

    Raises:
        RowError: If it is missing, too large, outside the folder, or not allowed.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, dict):
        data = value.get("bytes")
        return load_image_bytes(data if data else value.get("path"), folder, allow_urls=allow_urls)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str):
        raise RowError(
            "image_type", f"an image is bytes, {{'bytes', 'path'}}, a path or an address, not {type(value).__name__}"
        )
    if value.startswith("data:"):
        return _decode_data_uri(value)
    if "://" in value and not value.startswith("file://"):
        if folder is not None and folder.fs is None and value.startswith(f"{folder.root}@"):
            # A Hub dataset's own loose file, as its loader names it.
            return fetch_remote(value, MAX_IMAGE_FILE_BYTES)
        if not allow_urls:
            raise RowError(
                "image_url", f"image address {value[:200]!r} is remote and data.allow_urls is off", url=value[:200]
            )
        return fetch_remote(value, MAX_IMAGE_FILE_BYTES)
    if folder is None or folder.fs is None:
        raise RowError("image_outside", f"image path {value!r}: this source has no folder of images", path=value)
    return _read_file(folder.fs, folder.locate(value), value)


def _decode_data_uri(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise RowError("image_data_uri", "a data: URI must hold base64, as in 'data:image/png;base64,…'")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError("image_data_uri", f"a data: URI is not valid base64: {error}") from error


def _read_file(fs: Any, path: str, shown: str) -> bytes:
    try:
        if is_local(fs):
            # Opening a pipe would wait for ever for somebody to write into it.
            if os.path.exists(path) and not os.path.isfile(path):
                raise RowError(
                    "image_unreadable", f"image path {shown!r} is no regular file; put one there", path=shown
                )
            with open(path, "rb") as handle:
                data = handle.read(MAX_IMAGE_FILE_BYTES + 1)
        else:
            with fs.open(path, "rb") as handle:
                data = handle.read(MAX_IMAGE_FILE_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError, KeyError) as error:
        raise RowError(
            "image_not_found", f"image file {shown!r} does not exist in the source's folder", path=shown
        ) from error
    except RowError:
        raise
    except _UNREADABLE as error:
        raise RowError("image_unreadable", f"image file {shown!r} cannot be read: {error}", path=shown) from error
    if len(data) > MAX_IMAGE_FILE_BYTES:
        raise RowError(
            "image_file_too_large", f"image file {shown!r} is over {MAX_IMAGE_FILE_BYTES >> 20} MiB", path=shown
        )
    return data


def open_image(data: bytes | Image.Image, max_source_pixels: int) -> Image.Image:
    """Reads the header and checks it; no pixel is decoded yet.

    Raises:
        RowError: If it is no allowed image, or its header gives too many pixels or too narrow a strip.
    """
    if isinstance(data, Image.Image):
        image = data
    else:
        if not data:
            raise RowError("image_empty", "the image has no bytes")
        try:
            image = Image.open(io.BytesIO(data), formats=ALLOWED_FORMATS)
        except _TOO_LARGE as error:
            raise RowError("image_too_many_pixels", f"{error}: over max_source_pixels {max_source_pixels}") from error
        except UnidentifiedImageError as error:
            allowed = ", ".join(ALLOWED_FORMATS)
            raise RowError(
                "image_format",
                f"not an image of a known format ({allowed}); it starts with {data[:8]!r}",
                size_bytes=len(data),
            ) from error
        except DAMAGED as error:
            raise RowError("image_damaged", f"the image's header is damaged: {error}", size_bytes=len(data)) from error
    check_size(image, max_source_pixels)
    return image


def check_size(image: Image.Image, max_source_pixels: int) -> None:
    """Checks the size of an image, or of the frame that it stands at.

    Args:
        image: Need not be decoded.
        max_source_pixels: Most pixels.

    Raises:
        RowError: It has none, too many, or is too narrow a strip.
    """
    width, height = image.size
    if width < 1 or height < 1:
        raise RowError("image_empty", f"the image is {width} x {height} pixels", width=width, height=height)
    if width * height > max_source_pixels:
        message = (
            f"the image is {width} x {height} = {width * height} pixels, over max_source_pixels {max_source_pixels}"
        )
        raise RowError("image_too_many_pixels", message, width=width, height=height)
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        message = f"the image is {width} x {height}: one side is over {MAX_ASPECT_RATIO} times the other"
        raise RowError("image_aspect_ratio", message, width=width, height=height)


def upright_image(image: Image.Image) -> Image.Image:
    """Decodes to mode L or RGB, upright by its EXIF orientation, what is transparent over white.

    Raises:
        RowError: If the data are cut short or damaged.
    """
    try:
        image.load()
        if image.format != "JPEG" or not _JPEG_TURNED_BY.isdisjoint(image.info):
            ImageOps.exif_transpose(image, in_place=True)  # in place: the other way copies upright images as well
        return _opaque(image)
    except _TOO_LARGE as error:
        raise RowError("image_too_many_pixels", f"a part of the image is larger than may be: {error}") from error
    except DAMAGED as error:
        reason = "image_truncated" if "truncated" in str(error) or "EOF" in str(error) else "image_damaged"
        raise RowError(
            reason, f"the image cannot be decoded: {error}", width=image.width, height=image.height
        ) from error


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image)
    if image.has_transparency_data:
        is_grey = image.mode in ("L", "LA", "La")
        layer = image.convert("RGBA")
        page = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        page.alpha_composite(layer)
        return page.convert("L" if is_grey else "RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales deep grey values instead of clipping them at 255, as a plain convert() would.

    Raises:
        RowError: If one of them is not a number, or infinite.
    """
    values = np.asarray(image)
    if image.mode == "F":
        num_not_finite = values.size - int(np.count_nonzero(np.isfinite(values)))
        if num_not_finite:
            raise RowError(
                "image_not_finite",
                f"{num_not_finite} of the image's {values.size} pixels are not-a-number or infinite; give them a value",
                num_pixels=num_not_finite,
            )
        values = values.astype(np.float64)
        low, high = (
            (0.0, 1.0) if values.min() >= 0 and values.max() <= 1 else (float(values.min()), float(values.max()))
        )
    else:
        values = values.astype(np.float64)
        # 32-bit modes carry 16-bit data (PGM, PNG) unless their values say otherwise.
        low, high = (
            (0.0, 65535.0)
            if values.min() >= 0 and values.max() <= 65535
            else (float(values.min()), float(values.max()))
        )
    scaled = (values - low) * 255.0 / max(high - low, 1e-12)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))
