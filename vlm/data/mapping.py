"""Columns become a conversation: which column holds what, and what its values may be."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from vlm.config.data import ColumnMapping, DataConfig
from vlm.data.images import is_missing
from vlm.data.messages import parse_conversation
from vlm.data.rows import MappedRow, Row, RowError
from vlm.data.sources import RowStream
from vlm.errors import DataError, near_names

# Where a row's metadata keeps all answers that count as right.
REFERENCES = "answers"
_PROMPT_NAMES = ("prompt", "question", "query")
_ANSWER_NAMES = ("text", "answer", "label", "answers")
_IMAGE_NAMES = ("image", "images")


@dataclass(frozen=True)
class Columns:
    """The columns of one stream, every name of which exists.

    Attributes:
        plain: Columns that are carried along as metadata where their values are plain.
    """

    messages: str | None
    images: tuple[str, ...]
    prompt: str | None
    answer: str | None
    references: str | None
    system: str | None
    id: str | None
    group: str | None
    plain: tuple[str, ...]


def resolve_columns(mapping: ColumnMapping, stream: RowStream) -> Columns:
    """Finds the mapped columns in a stream, before any of its rows is read.

    Raises:
        DataError: If a named column is not there, or nothing holds the answers.
    """
    known = stream.columns
    named = [
        ("messages", mapping.messages),
        ("prompt", mapping.prompt),
        ("answer", mapping.answer),
        ("references", mapping.references),
        ("system", mapping.system),
    ]
    named += [("id", mapping.id), ("group", mapping.group), *(("images", name) for name in mapping.images or ())]
    for setting, name in named:
        if name is not None and name not in known:
            raise DataError(
                f"data.columns.{setting} names the column {name!r}, but {stream.label!r} has no such column. "
                f"{near_names(name, known, limit=20)} Its columns: {', '.join(known)}."
            )

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in known), None)

    answer = mapping.answer or first(_ANSWER_NAMES)
    messages = mapping.messages or (first(("messages",)) if answer is None else None)
    if messages is None and answer is None:
        raise DataError(
            f"{stream.label!r} has no column that holds answers: none of {', '.join(map(repr, _ANSWER_NAMES))} and no 'messages'. "
            f"Name one with data.columns.answer or data.columns.messages. Its columns: {', '.join(known)}."
        )
    images = mapping.images if mapping.images is not None else tuple(name for name in _IMAGE_NAMES if name in known)
    turns = (None, None, None) if messages else (mapping.prompt or first(_PROMPT_NAMES), answer, mapping.system)
    prompt, answer, system = turns
    row_id = mapping.id or first(("id",))
    group = mapping.group or first(("group",))
    used = {messages, prompt, answer, mapping.references, system, row_id, group, *images}
    return Columns(
        messages,
        images,
        prompt,
        answer,
        mapping.references,
        system,
        row_id,
        group,
        tuple(name for name in known if name not in used),
    )


def map_row(row: Row, columns: Columns, data: DataConfig) -> MappedRow:
    """Turns one row into a conversation with image references.

    Raises:
        RowError: If the row has no answer, or its conversation or images are not as they must be.
    """
    images = _images(row, columns)
    metadata = _metadata(row, columns)
    references = _references(row.get(columns.references or ""))
    if columns.messages is not None:
        messages, images = parse_conversation(row.get(columns.messages), images)
    else:
        answer, all_answers = _answer(row.get(columns.answer or ""))
        references = references or all_answers
        prompt = _words(row.get(columns.prompt)) if columns.prompt else None
        messages = [_text_turn("assistant", answer)]
        messages.insert(
            0,
            {
                "role": "user",
                "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": prompt or data.prompt}],
            },
        )
        if columns.system and _words(row.get(columns.system)):
            messages.insert(0, _text_turn("system", _words(row[columns.system])))
    if references:
        metadata[REFERENCES] = references
    if messages[0]["role"] != "system" and data.system is not None:
        messages.insert(0, _text_turn("system", data.system))
    mapped = MappedRow(row_name(row, columns), _name(row.get(columns.group or "")), messages, images, metadata)
    _check_characters(mapped)
    return mapped


def _check_characters(row: MappedRow) -> None:
    """JSON can spell one half of a surrogate pair, which no file in UTF-8 can hold.

    Raises:
        RowError: If a text has one.
    """
    texts = [part["text"] for message in row.messages for part in message["content"] if part["type"] == "text"]
    texts += [*row.metadata, row.id or "", row.group or ""]
    for value in row.metadata.values():
        texts += value if isinstance(value, list) else [value] if isinstance(value, str) else []
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                "bad_unicode",
                f"the row has half a character, {text[error.start : error.end]!r}, behind {text[: error.start][-40:]!r}; mend its"
                " encoding",
            ) from error


def row_name(row: Row, columns: Columns) -> str | None:
    """The row's own id, or None."""
    return _name(row.get(columns.id or ""))


def _text_turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _images(row: Row, columns: Columns) -> list[Any]:
    found: list[Any] = []
    for name in columns.images:
        value = row.get(name)
        if isinstance(value, str) and value.startswith("["):
            # How CSV files write lists.
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise RowError(
                    "image_list", f"column {name!r} starts like a list but is not JSON: {error}", column=name
                ) from error
        values = value if isinstance(value, list | tuple) else [value]
        found.extend(item for item in values if not is_missing(item))
    return found


def _answer(value: Any) -> tuple[str, list[str]]:
    """The answer to learn, and all of them where a row has several (VQA)."""
    if isinstance(value, list | tuple):
        answers = _listed(value)
        if not answers:
            raise RowError("empty_answer", "the row's list of answers is empty")
        # The first of those that most people gave.
        return Counter(answers).most_common(1)[0][0], answers
    answer = _words(value)
    if not answer.strip():
        raise RowError("empty_answer", "the row has no answer")
    return answer, []


def _references(value: Any) -> list[str]:
    """All answers of a column that is for them: a list, also as CSV files write it, or a single answer."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = [value]
    return _listed(value if isinstance(value, list | tuple) else [value])


def _listed(value: Any) -> list[str]:
    """The texts of a list that are not blank, also of VQA's objects; nothing for what is no list."""
    if not isinstance(value, list | tuple):
        return []
    listed = [_words(item.get("answer") if isinstance(item, dict) else item) for item in value]
    return [answer for answer in listed if answer.strip()]


def _words(value: Any) -> str:
    """Text of a cell: numbers are written out, structures become JSON, nothing and not-a-number are empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float | decimal.Decimal | datetime.date | datetime.time):
        return str(value)
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    raise RowError("answer_type", f"a text column holds a {type(value).__name__}; it must hold text or numbers")


def _name(value: Any) -> str | None:
    words = _words(value)
    return words if words else None


def _metadata(row: Row, columns: Columns) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for name in columns.plain:
        value = row.get(name)
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        if value is None or isinstance(value, str | bool | int | float):
            metadata[name] = value
        elif isinstance(value, decimal.Decimal | datetime.date | datetime.time):
            metadata[name] = str(value)
    return metadata
