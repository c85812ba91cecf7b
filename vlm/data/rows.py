"""What passes between the stages of preparation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from vlm.families.video import Video
from vlm.redaction import without_secrets

Row = dict[str, Any]


class RowError(Exception):
    """One row cannot be used: it is dropped, and the ledger says why, without passwords and tokens of addresses.

    Attributes:
        reason: Short name that equal cases share, such as ``"image_truncated"``.
        message: A sentence for people: the value, the rule, the remedy where there is one.
        details: Plain values for the ledger.
    """

    def __init__(self, reason: str, message: str, **details: Any) -> None:
        message = without_secrets(message)
        details = {name: without_secrets(value) if isinstance(value, str) else value for name, value in details.items()}
        super().__init__(reason, message, details)
        self.reason = reason
        self.message = message
        self.details = details


@dataclass(frozen=True)
class UnreadableRow:
    """Stands in a stream for a row that could not even be parsed."""

    reason: str
    message: str


@dataclass(frozen=True)
class MappedRow:
    """A row once columns have become a conversation; images are still references.

    Attributes:
        id: Its own name, or None.
        group: Rows of equal group stay in one split; None if there is none.
        messages: OpenAI-style turns whose contents are lists of parts; ``{"type": "image"}`` and ``{"type": "video"}`` parts stand for `images` in order.
        images: Bytes, ``{"bytes", "path"}`` dictionaries, paths, addresses, Pillow images, or `VideoReference`s.
        metadata: Plain values carried along.
    """

    id: str | None
    group: str | None
    messages: list[dict[str, Any]]
    images: list[Any]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A finished row, ready to be written.

    Attributes:
        images: What image and video parts stand for, in order: arrays of shape [height, width, 1 or 3], uint8, at the size
            the model sees, and videos of such frames.
        assistant_spans: Half-open token ranges that carry loss.
    """

    id: str | None
    group: str | None
    messages: list[dict[str, Any]]
    images: list[np.ndarray | Video]
    input_ids: list[int]
    assistant_spans: list[tuple[int, int]]
    num_visual_tokens: int
    metadata: dict[str, Any]

    @property
    def num_supervised_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(end - start for start, end in self.assistant_spans)

    @property
    def size_bytes(self) -> int:
        """Roughly what it takes on disk."""
        return sum(image.nbytes for image in self.images) + 4 * len(self.input_ids) + 512


class Note(NamedTuple):
    """What the ledger should say of a row."""

    action: Literal["dropped", "shrunk", "warning"]
    reason: str
    message: str
    details: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of one row: a sample, or the error that dropped it; and what else the ledger should say."""

    id: str | None = None
    sample: Sample | None = None
    error: RowError | None = None
    notes: list[Note] = field(default_factory=list)
