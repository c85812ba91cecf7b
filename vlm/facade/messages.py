"""Messages of notebooks, with images and videos inside, to messages and these apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm.data.messages import content_parts, parse_conversation
from vlm.data.rows import RowError
from vlm.errors import DataError


def split_messages(messages: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Takes the images out of a conversation that need not be complete, such as a question alone.

    Args:
        messages: OpenAI-style messages.

    Returns:
        Messages whose image parts are ``{"type": "image"}`` and video parts ``{"type": "video"}``, and the references in
        order, None for image parts without one.

    Raises:
        DataError: A message breaks a rule.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"a conversation is a non-empty list of messages, not {type(messages).__name__}")
    plain, references = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DataError(f"message {number} is not an object with 'role' and 'content'; give both")
        try:
            parts = content_parts(message["content"], number)
        except RowError as error:
            raise DataError(error.message) from error
        references += [part["reference"] for part in parts if part["type"] != "text"]
        plain.append(
            {
                "role": message["role"],
                "content": [part if part["type"] == "text" else {"type": part["type"]} for part in parts],
            }
        )
    return plain, references


def training_conversation(row: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """A complete conversation of a training row.

    Args:
        row: ``{"messages": […]}``, perhaps with ``"images"`` or ``"image"`` for image parts without one; or the messages.

    Returns:
        Messages and image references, as in `split_messages`.

    Raises:
        DataError: The row is none, or its conversation breaks a rule.
    """
    images: Any = []
    if isinstance(row, dict):
        if "messages" not in row:
            raise DataError(f"a row has the keys {sorted(row)} but no 'messages'; convert it to OpenAI-style messages")
        images = row.get("images", row.get("image"))
        row = row["messages"]
    images = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    try:
        messages, references = parse_conversation(row, images)
    except RowError as error:
        raise DataError(f"a conversation cannot be trained on: {error.message}") from error
    if any(reference is None for reference in references):
        raise DataError("an image part has no image; put it into the part as {'type': 'image', 'image': …}")
    return messages, references
