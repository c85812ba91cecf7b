"""``process_vision_info``: the images of messages, in order, for a processor's call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlm.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


def process_vision_info(messages: Any, *, allow_urls: bool = False) -> tuple[list[Image] | None, None]:
    """Loads the images of a conversation.

    An image part may say at which size it wants its image: ``resized_height`` with ``resized_width``, ``min_pixels``,
    ``max_pixels``.

    Args:
        messages: OpenAI-style messages, or a list of such conversations.
        allow_urls: Fetch images that messages name by a remote address.

    Returns:
        RGB images in the order of their parts, None if there are none; and None for videos.

    Raises:
        DataError: A message breaks a rule, an image cannot be used, or there is a video.
    """
    from vlm.facade.images import load_image
    from vlm.facade.messages import split_messages

    several = bool(messages) and not isinstance(messages[0], Mapping)
    images = []
    for conversation in messages if several else [messages]:
        _, references = split_messages(conversation)
        for part, reference in zip(_image_parts(conversation), references, strict=True):
            if reference is None:
                raise DataError("an image part has no image; put it into the part as {'type': 'image', 'image': …}")
            image = load_image(reference, allow_urls=allow_urls).convert("RGB")
            size = _size(image.size, part)
            images.append(image if size == image.size else image.resize(size, resample=3))  # bicubic
    return images or None, None


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
