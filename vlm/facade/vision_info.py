"""``process_vision_info``: the images and videos of messages, in order, for a processor's call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlm.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


def process_vision_info(
    messages: Any, return_video_kwargs: bool = False, *, allow_urls: bool = False, max_video_frames: int | None = None
) -> tuple[Any, ...]:
    """Loads the images and videos of a conversation.

    A part may say at which size it wants its image or its frames: ``resized_height`` with ``resized_width``, ``min_pixels``,
    ``max_pixels``.

    Args:
        messages: OpenAI-style messages, or a list of such conversations.
        return_video_kwargs: Give the rates of the videos, too.
        allow_urls: Fetch images that messages name by a remote address.
        max_video_frames: Of longer videos, evenly spaced frames are taken; None takes the default of `data`.

    Returns:
        RGB images in the order of their parts, and videos as lists of RGB frames; each None if there are none. With
        `return_video_kwargs` also ``{"fps": […]}``, frames per second of each video, for the processor's call.

    Raises:
        DataError: A message breaks a rule, or an image or video cannot be used.
    """
    from vlm.facade.images import load_medium
    from vlm.facade.messages import split_messages

    several = bool(messages) and not isinstance(messages[0], Mapping)
    images, videos, rates = [], [], []
    for conversation in messages if several else [messages]:
        _, references = split_messages(conversation)
        for part, reference in zip(_image_parts(conversation), references, strict=True):
            if reference is None:
                raise DataError("an image part has no image; put it into the part as {'type': 'image', 'image': …}")
            medium = load_medium(reference, allow_urls=allow_urls, max_video_frames=max_video_frames)
            size = _size((medium.width, medium.height), part)
            frames = [_sized(frame.convert("RGB"), size) for frame in medium.frames]
            if medium.frames_per_second is None:
                images += frames
            else:
                videos.append(frames)
                rates.append(medium.frames_per_second)
    found = images or None, videos or None
    return (*found, {"fps": rates}) if return_video_kwargs else found


def _sized(image: Image, size: tuple[int, int]) -> Image:
    return image if size == image.size else image.resize(size, resample=3)  # bicubic


def _image_parts(conversation: Any) -> list[Mapping[str, Any]]:
    return [
        part
        for message in conversation
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] != "text"
    ]


def _size(size: tuple[int, int], part: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height in pixels that a part asks for."""
    width, height = size
    exact = part.get("resized_width"), part.get("resized_height")
    if any(exact):
        if not all(exact):
            raise DataError("an image part has only one of resized_height and resized_width; give both")
        return int(exact[0] or 0), int(exact[1] or 0)
    pixels, least, most = width * height, part.get("min_pixels"), part.get("max_pixels")
    if most and pixels > most:
        scale = math.sqrt(most / pixels)
        return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    if least and pixels < least:
        scale = math.sqrt(least / pixels)
        return math.ceil(width * scale), math.ceil(height * scale)
    return size
