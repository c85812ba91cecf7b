"""Rows by the values of their metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vlm.errors import DataError, near_names
from vlm.evaluation.predictions import Prediction

MAX_SLICES = 30
NO_VALUE = "(none)"
OTHERS = "(others)"


def slice_values(rows: Sequence[Prediction], column: str) -> list[str]:
    """Says which slice each row is in.

    Args:
        rows: Answers.
        column: A metadata column, or `group`.

    Returns:
        The column's value as text for each row: ``(none)`` where it is missing, and ``(others)`` for values that are not
        among the most frequent ones, where there are too many to show.

    Raises:
        DataError: No row has that column.
    """
    metadata = [({} if row.group is None else {"group": row.group}) | row.metadata for row in rows]
    known = sorted({name for fields in metadata for name in fields})
    if column not in known:
        raise DataError(
            f"evaluation.slice_by names {column!r}, which is no metadata column of the evaluated rows."
            f" {near_names(column, known, limit=20)}"
        )
    values = [_text(fields.get(column), column) for fields in metadata]
    counts = Counter(values)
    if len(counts) > MAX_SLICES:
        kept = {name for name, _ in counts.most_common(MAX_SLICES - 1)}
        values = [name if name in kept else OTHERS for name in values]
    return values


def _text(value: Any, column: str) -> str:
    if value is None or value == "":
        return NO_VALUE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict):
        raise DataError(
            f"evaluation.slice_by names {column!r}, which holds lists; slice by a column whose values are plain"
        )
    return str(value)
