"""The index: which key of which step gave which artifacts. A record is written last, so it means "complete"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from artifacts.backend import Backend, Entry
from artifacts.keys import canonical_json
from artifacts.refs import ArtifactRef, check_name
from artifacts.sealed import BrokenSealError, seal, unseal


@dataclass(frozen=True)
class IndexRecord:
    """What one run of one step left behind.

    Attributes:
        unit: The step.
        key: Its key.
        document: The key document; kept to explain why a later key differs.
        outputs: The artifacts, by the names that the step gives them.
        info: Small JSON data about the run (seconds, host, …), outside the key.
        created: When it was recorded: ISO 8601 in UTC.
    """

    unit: str
    key: str
    document: Mapping[str, Any]
    outputs: Mapping[str, ArtifactRef]
    info: Mapping[str, Any]
    created: str

    @property
    def created_seconds(self) -> float:
        """The time of recording in seconds since 1970."""
        return datetime.fromisoformat(self.created).timestamp()

    def to_bytes(self) -> bytes:
        """Returns the record's file."""
        fields = {
            "unit": self.unit,
            "key": self.key,
            "document": dict(self.document),
            "outputs": {name: ref.to_json() for name, ref in self.outputs.items()},
            "info": dict(self.info),
            "created": self.created,
        }
        canonical_json(fields)  # raises for what is not plain JSON
        return seal(fields)

    @classmethod
    def from_bytes(cls, raw: bytes) -> IndexRecord:
        """Reads a record's file.

        Raises:
            BrokenSealError: If it is not what was written.
            NewerSchemaError: If it was written by a later version.
        """
        fields = unseal(raw)
        try:
            outputs = {name: ArtifactRef.from_json(ref) for name, ref in fields.pop("outputs").items()}
            datetime.fromisoformat(fields["created"])
            fields |= {name: dict(fields[name]) for name in ("document", "info")}
            return cls(outputs=outputs, **fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BrokenSealError(f"a field is missing or wrong ({error})") from error


def now() -> str:
    """Returns the time: ISO 8601 in UTC, with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class Index:
    """The records of one place."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @staticmethod
    def path(unit: str, key: str) -> str:
        """Returns where a record lies, relative to the store's root."""
        return f"index/{check_name(unit, 'step')}/{check_name(key, 'key')}.json"

    def write(self, record: IndexRecord) -> None:
        """Writes a record, replacing an older one of the same key."""
        self._backend.write(self.path(record.unit, record.key), record.to_bytes())

    def read(self, unit: str, key: str) -> IndexRecord | None:
        """Reads a record; None if there is none.

        Raises:
            BrokenSealError: If it is corrupt.
        """
        try:
            raw = self._backend.read(self.path(unit, key))
        except FileNotFoundError:
            return None
        record = IndexRecord.from_bytes(raw)
        if (record.unit, record.key) != (unit, key):
            raise BrokenSealError(f"it is the record of {record.unit} {record.key[:12]}")
        return record

    def remove(self, unit: str, key: str) -> None:
        """Removes a record."""
        self._backend.remove(self.path(unit, key))

    def names(self, unit: str | None = None) -> Iterator[tuple[str, str, Entry]]:
        """Yields unit, key and file entry of all records, or of those of one unit."""
        folder = "index" if unit is None else f"index/{check_name(unit, 'step')}"
        for entry in self._backend.walk(folder):
            _, found_unit, name = entry.path.split("/", 2)
            if name.endswith(".json"):
                yield found_unit, name.removesuffix(".json"), entry

    def records(self, unit: str | None = None, *, limit: int | None = None) -> list[IndexRecord]:
        """Returns the readable records, newest first.

        Args:
            unit: Only those of this step.
            limit: At most so many.
        """
        names = sorted(self.names(unit), key=lambda found: found[2].modified, reverse=True)
        records = []
        for found_unit, key, _ in names[:limit]:
            try:
                record = self.read(found_unit, key)
            except BrokenSealError:
                continue  # lookup of its key, or verify, removes it
            if record is not None:
                records.append(record)
        return sorted(records, key=lambda record: record.created, reverse=True)
