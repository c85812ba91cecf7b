"""The ledger: one line for every row that was dropped, shrunk or is worth a warning. Nothing is lost without an entry."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

Action = Literal["dropped", "shrunk", "warning"]


class Ledger:
    """Appends to ``ledger.jsonl`` and counts; use as a context manager.

    Attributes:
        counts: Number of entries by action and reason.
        examples: The first entry of each action and reason.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.counts: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], dict[str, Any]] = {}

    def __enter__(self) -> Ledger:
        self._file = self._path.open("w", encoding="utf-8", newline="\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(
        self,
        action: Action,
        reason: str,
        message: str,
        *,
        source: str,
        row: int,
        row_id: str | None,
        details: dict[str, Any],
    ) -> None:
        """Writes one entry.

        Args:
            action: What was done with the row.
            reason: Short name that equal cases share.
            message: A sentence for people.
            source: Label of the stream.
            row: Number of the row in it, from 0.
            row_id: The row's id, if it was known.
            details: Plain values: sizes, lengths before and after.
        """
        entry = {
            "source": source,
            "row": row,
            "id": row_id,
            "action": action,
            "reason": reason,
            "message": message,
            "details": details,
        }
        self._file.write(
            json.dumps(entry, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()
            + "\n"
        )
        self.counts[action, reason] += 1
        self.examples.setdefault((action, reason), entry)

    def num_dropped(self) -> int:
        """Rows dropped so far."""
        return sum(count for (action, _), count in self.counts.items() if action == "dropped")

    def by_action(self) -> dict[str, dict[str, int]]:
        """Counts as ``{action: {reason: count}}``."""
        result: dict[str, dict[str, int]] = {}
        for (action, reason), count in sorted(self.counts.items()):
            result.setdefault(action, {})[reason] = count
        return result

    def describe_dropped(self) -> str:
        """Reasons with counts and the first example, for an error message."""
        dropped = sorted(
            ((count, reason) for (action, reason), count in self.counts.items() if action == "dropped"), reverse=True
        )
        lines = [f"{count} x {reason}" for count, reason in dropped]
        first = self.examples["dropped", dropped[0][1]]
        return (
            f"{', '.join(lines)}. First: {first['source']} row {first['row']} (id {first['id']!r}): {first['message']}."
        )
