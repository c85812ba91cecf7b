"""The base of what builders return: small facts that a task shows, logs and stores as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Summary:
    """A few plain values about what was just built."""

    def to_json(self) -> dict[str, Any]:
        """The values as JSON-able data, by field name."""
        return asdict(self)
