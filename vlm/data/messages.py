"""Checks ready conversations (OpenAI style) and brings them to one form.

In: a list, or its JSON text, of ``{"role", "content"}``; the content is text or a list of parts ``{"type": "text", "text"}``,
``{"type": "image"[, "image": reference]}``, ``{"type": "image_url", "image_url": {"url"} or address}`` and
``{"type": "video", "video": frames, folder or animated file[, "fps": rate]}``.
Out: every content is a list of text, ``{"type": "image"}`` and ``{"type": "video"}`` parts, and the references stand apart,
in order.
"""

from __future__ import annotations

import json
from typing import Any

from vlm.data.images import is_missing
from vlm.data.rows import RowError
from vlm.data.video import video_reference

_ROLES = ("system", "user", "assistant")


def parse_conversation(value: Any, row_images: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Validates one conversation.

    Args:
        value: The cell of the messages column.
        row_images: Images of the row's own image columns; image parts without a reference take them in order.

    Returns:
        The turns and the references in the order of their parts: a `VideoReference` for a video, else an image's.

    Raises:
        RowError: If the conversation breaks a rule.
    """
    turns = _as_list(value)
    waiting = list(row_images)
    images: list[Any] = []
    num_bare_parts = 0
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            raise RowError(
                "bad_message", f"message {number} is not an object with 'role' and 'content'", message_number=number
            )
        role = turn["role"]
        if role not in _ROLES:
            raise RowError(
                "bad_role", f"message {number} has the role {role!r}; known: {', '.join(_ROLES)}", role=str(role)
            )
        parts: list[dict[str, Any]] = []
        for part in content_parts(turn["content"], number):
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
                continue
            if role != "user":
                raise RowError(
                    "bad_part_type",
                    f"message {number} ({role}) holds an image or a video; only the user's may",
                    role=role,
                )
            parts.append({"type": part["type"]})
            if part["reference"] is None:
                num_bare_parts += 1
                images.append(waiting.pop(0) if waiting else None)
            else:
                images.append(part["reference"])
        messages.append({"role": role, "content": parts})
    if num_bare_parts != len(row_images):
        text = " ".join(part.get("text", "") for message in messages for part in message["content"])
        hint = (
            "; '<image>' inside text is not a placeholder here, use {'type': 'image'} parts"
            if "<image>" in text
            else ""
        )
        raise RowError(
            "image_count",
            f"the messages have {num_bare_parts} image parts without a reference, the row has {len(row_images)} images{hint}",
            num_parts=num_bare_parts,
            num_images=len(row_images),
        )
    _check_order(messages)
    return messages, images


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError("bad_messages", f"the messages are text but not JSON: {error}") from error
    if not isinstance(value, list | tuple) or not value:
        raise RowError("bad_messages", f"messages must be a non-empty list of turns, not {_shown(value)}")
    return list(value)


def content_parts(content: Any, number: int) -> list[dict[str, Any]]:
    """One turn's content as parts ``{"type": "text", "text"}``, ``{"type": "image", "reference"}`` and the same for videos.

    Args:
        content: Text, or a list of parts.
        number: Of the turn, for messages.

    Raises:
        RowError: It is neither, or has a part of another type.
    """
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise RowError(
            "bad_message",
            f"message {number}'s content must be text or a list of parts, not {_shown(content)}",
            message_number=number,
        )
    parts = []
    for part in content:
        if not isinstance(part, dict):
            raise RowError(
                "bad_part_type",
                f"message {number} has a part that is not an object: {_shown(part)}",
                message_number=number,
            )
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image":
            reference = part.get("image")
            parts.append({"type": "image", "reference": None if is_missing(reference) else reference})
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str) or not url:
                raise RowError(
                    "bad_part_type", f"message {number} has an image_url part without a url", message_number=number
                )
            parts.append({"type": "image", "reference": url})
        elif kind == "video":
            reference = video_reference(part)
            if reference is None:
                raise RowError(
                    "bad_part_type",
                    f"message {number} has a video part without a list of frames, a folder or an animated file under 'video',"
                    " or with an 'fps' that is no positive number",
                    message_number=number,
                )
            parts.append({"type": "video", "reference": reference})
        else:
            raise RowError(
                "bad_part_type",
                f"message {number} has a part of type {kind!r}; known: text, image, image_url, video",
                type=str(kind),
            )
    return parts


def _check_order(messages: list[dict[str, Any]]) -> None:
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message["role"] != expected:
            raise RowError(
                "bad_order",
                f"turn {number} after the system prompt is by {message['role']!r} where {expected!r} must speak",
            )
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError("no_answer", "the conversation does not end with the assistant's answer")
    if not last_text(messages).strip():
        raise RowError("empty_answer", "the assistant's last message has no text")


def last_text(messages: list[dict[str, Any]]) -> str:
    """Text of the last turn."""
    return "".join(part.get("text", "") for part in messages[-1]["content"])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
