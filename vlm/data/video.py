"""From a video's reference to frames: a list of images, a folder of them, or an animated file that Pillow decodes.

Of a long video, evenly spaced frames are taken, the first and the last among them; only those are decoded, where the
format allows. Film formats such as MP4 need a decoder that is not here: take the frames out beforehand.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlm.data.images import DAMAGED, check_size, open_image, upright_image
from vlm.data.locations import IMAGE_SUFFIXES
from vlm.data.rows import RowError
from vlm.families.video import Video

# Of an image (height, width), of a video (frames, height, width), in pixels.
MediumSize = tuple[int, ...]
# Of frames without a clock, such as a list of images: what Qwen's own tools assume.
DEFAULT_FRAMES_PER_SECOND = 2.0
# A row's images may have so many times `max_source_pixels` together, and an animation's frames, decoded one by one, so many.
MAX_IMAGES_OF_ROW = 8
_MAX_DECODED = 100
_FILMS = frozenset([".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv"])


@dataclass(frozen=True)
class VideoReference:
    """What a video part of a message names.

    Attributes:
        value: A list of image references, a folder, or an animated file as bytes, path, address or Pillow image.
        frames_per_second: Of the source, where the message says so.
    """

    value: Any
    frames_per_second: float | None


@dataclass(frozen=True)
class Medium:
    """A decoded image or video in its original size.

    Attributes:
        frames: Upright images of one size; a single one for an image.
        frames_per_second: Of these frames; None for an image.
        max_pixels: Largest area of a frame; None for no limit of its own.
    """

    frames: Sequence[Image.Image]
    frames_per_second: float | None = None
    max_pixels: int | None = None

    @property
    def height(self) -> int:
        """Of a frame, in pixels."""
        return self.frames[0].height

    @property
    def width(self) -> int:
        """Of a frame, in pixels."""
        return self.frames[0].width


def video_reference(part: dict[str, Any]) -> VideoReference | None:
    """The reference of a part ``{"type": "video", "video": …[, "fps": …]}``.

    Returns:
        None where it names nothing, or gives a rate that is no positive number.
    """
    value, rate = part.get("video"), part.get("fps")
    if value is None or (isinstance(value, str | bytes | list | tuple) and not value):
        return None
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1e6):
        return None
    return VideoReference(value, None if rate is None else float(rate))


def chosen_frames(num_frames: int, max_frames: int) -> list[int]:
    """Numbers of the frames that are taken: all, or evenly spaced ones from the first to the last.

    Args:
        num_frames: Frames of the video.
        max_frames: Most to take.
    """
    if num_frames <= max_frames:
        return list(range(num_frames))
    if max_frames == 1:
        return [0]
    return [round(number * (num_frames - 1) / (max_frames - 1)) for number in range(max_frames)]


def load_video(
    reference: VideoReference,
    *,
    load: Callable[[Any], bytes | Image.Image],
    list_folder: Callable[[str], list[str]],
    max_frames: int,
    max_source_pixels: int,
    max_pixels: int | None,
    max_total_pixels: int,
) -> Medium:
    """Decodes a video's frames.

    Args:
        reference: What the message names.
        load: Fetches an image reference.
        list_folder: Gives the names of the files in a folder, as `load` takes them.
        max_frames: Most frames to take.
        max_source_pixels: Frames with more pixels than this are not decoded.
        max_pixels: Goes into the result.
        max_total_pixels: Most pixels of the frames that are taken, together.

    Raises:
        RowError: There is no frame, one cannot be used, or they differ in size.
    """
    value = reference.value
    suffix = posixpath.splitext(value.lower())[1] if isinstance(value, str) and not value.startswith("data:") else ""
    if suffix in _FILMS:
        raise RowError(
            "video_format",
            f"video {value[-200:]!r} is a film, for which there is no decoder here; take its frames out beforehand and name"
            " them as a list, a folder, or an animated file (GIF, WebP, PNG, TIFF)",
        )
    if isinstance(value, str) and not value.startswith("data:") and suffix not in IMAGE_SUFFIXES and "://" not in value:
        value = sorted((name for name in list_folder(value) if _is_image(name)), key=_by_number)
        if not value:
            raise RowError("video_empty", f"video folder {reference.value!r} holds no images; give a folder of frames")
    if isinstance(value, list | tuple):
        own_rate, count = None, len(value)
        chosen = chosen_frames(count, max_frames)
        frames = []
        for number in chosen:
            image = open_image(load(value[number]), max_source_pixels)
            max_total_pixels -= image.width * image.height
            check_total(max_total_pixels)
            frames.append(upright_image(image))
    else:
        image = open_image(load(value), max_source_pixels)
        own_rate, count, frames = _animation(image, max_frames, max_source_pixels, max_total_pixels)
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise RowError(
            "video_frame_sizes",
            f"the frames of a video differ in size, such as {sizes[0]} and {sizes[1]} (width, height); make them one size",
        )
    if any(frame.mode != "L" for frame in frames):
        frames = [frame.convert("RGB") for frame in frames]
    rate = reference.frames_per_second or own_rate or DEFAULT_FRAMES_PER_SECOND
    spacing = (count - 1) / (len(frames) - 1) if len(frames) > 1 else 1.0
    return Medium(frames, rate / spacing, max_pixels)


def check_total(pixels_left: int) -> None:
    """Checks that the images of a row, decoded, fit into memory together.

    Args:
        pixels_left: What may still be decoded of them.

    Raises:
        RowError: It is less than nothing.
    """
    if pixels_left < 0:
        raise RowError(
            "images_too_many_pixels",
            f"the row's images and frames have {-pixels_left} pixels more, together, than {MAX_IMAGES_OF_ROW} of"
            " data.max_source_pixels; divide the row, or raise that",
        )


def _animation(
    image: Image.Image, max_frames: int, max_source_pixels: int, max_total_pixels: int
) -> tuple[float | None, int, list[Image.Image]]:
    """Frames per second of the file (None if it does not say), its number of frames, and those that are taken."""
    try:
        count = int(getattr(image, "n_frames", 1))
        chosen = set(chosen_frames(count, max_frames))
        frames, milliseconds, num_decoded = [], 0.0, 0
        for number in range(count):
            image.seek(number)
            check_size(image, max_source_pixels)  # the header at the file's start spoke of the first frame alone
            num_decoded += image.width * image.height
            if num_decoded > _MAX_DECODED * max_source_pixels:
                raise RowError(
                    "video_too_many_pixels",
                    f"the {count} frames of a video have over {_MAX_DECODED} times max_source_pixels {max_source_pixels}"
                    " together; take fewer frames out beforehand",
                )
            if number in chosen:
                max_total_pixels -= image.width * image.height
                check_total(max_total_pixels)
            image.load()  # WebP tells a frame's duration only now
            milliseconds += float(image.info.get("duration") or 0)
            if number in chosen:
                frames.append(upright_image(image.copy()))
    except Image.DecompressionBombError as error:
        raise RowError("image_too_many_pixels", f"a frame of a video is larger than may be: {error}") from error
    except DAMAGED as error:
        raise RowError("image_damaged", f"an animated file cannot be decoded: {error}") from error
    return (1000 * count / milliseconds if milliseconds > 0 else None), count, frames


def _is_image(name: str) -> bool:
    return posixpath.splitext(name.lower())[1] in IMAGE_SUFFIXES


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts ``frame_10`` behind ``frame_9``."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def frames_as_images(
    messages: Sequence[dict[str, Any]], media: Sequence[Medium]
) -> tuple[list[dict[str, Any]], list[Medium]]:
    """Turns every video of a conversation into an image per frame.

    Args:
        messages: Turns whose contents are lists of parts.
        media: What the image and video parts stand for, in order.

    Returns:
        The turns without video parts, and the images.
    """
    left = iter(media)
    spread: list[Medium] = []
    turns = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "text":
                parts.append(part)
                continue
            medium = next(left)
            stills = [Medium([frame], max_pixels=medium.max_pixels) for frame in medium.frames]
            spread += stills
            parts += [{"type": "image"}] * len(stills)
        turns.append({**message, "content": parts})
    return turns, spread


class Resizer(Protocol):
    """What is needed of a model's processing."""

    def target_size(
        self, height: int, width: int, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> tuple[int, int]:
        """Size in pixels, (height, width), that the model sees an image at."""

    def resize_image(self, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """Pixels of shape [height, width, 3], uint8, resized with the model's own filter."""


def target_size(processing: Resizer, medium: Medium, min_pixels: int | None, max_pixels: int | None) -> MediumSize:
    """The size that the model sees an image or a video at.

    Args:
        processing: The model's.
        medium: Decoded.
        min_pixels: Smallest area of an image or frame; None takes the processor's.
        max_pixels: Largest area; None takes the processor's. The medium's own limit wins if it is lower.

    Raises:
        DataError: The model takes no image of this size.
    """
    if medium.max_pixels is not None:
        max_pixels = min(medium.max_pixels, max_pixels or medium.max_pixels)
        min_pixels = None if min_pixels is None else min(min_pixels, max_pixels)
    size = processing.target_size(medium.height, medium.width, min_pixels=min_pixels, max_pixels=max_pixels)
    return size if medium.frames_per_second is None else (len(medium.frames), *size)


def resize(processing: Resizer, medium: Medium, size: MediumSize) -> np.ndarray | Video:
    """Resizes an image, or every frame of a video.

    Args:
        processing: The model's.
        medium: Decoded.
        size: From `target_size`.

    Returns:
        uint8 array of shape [height, width, 3], or a video of such frames.
    """
    pixels = [processing.resize_image(frame, (size[-2], size[-1])) for frame in medium.frames]
    return pixels[0] if medium.frames_per_second is None else Video(np.stack(pixels), medium.frames_per_second)
