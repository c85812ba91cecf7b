"""What workers hand back: the rows of one part, finished but for names and splits, in an Arrow file.

Each row is there, in order, the dropped ones with no content but what the ledger says of them. Pixels are raw, as in the
dataset, so whoever joins parts copies them and does no work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from vlm.data.rows import Note
from vlm.data.sink import FinishedRow
from vlm.data.storage import BATCH_MAX_ROWS, BATCH_SIZE_BYTES, DATA_SCHEMA, Batch, Record

_SCHEMA = pa.schema(
    [
        # JSON in ASCII, because ids of dropped rows need not be valid Unicode.
        ("about", pa.string()),
        ("num_visual_tokens", pa.int32()),
        ("num_supervised_tokens", pa.int32()),
        *DATA_SCHEMA,
    ]
)
_NOTHING = Record(None, "", "", "", [], [], [], [], [], [], 0, 0)


class PartWriter:
    """Writes finished rows; holds one batch in memory. Use as a context manager.

    Args:
        target: Open for writing.

    Attributes:
        num_rows: Rows written so far.
    """

    def __init__(self, target: Any) -> None:
        self._file = pa.ipc.new_stream(target, _SCHEMA)
        self._rows, self._about, self._size_bytes = Batch(), list[str](), 0
        self.num_rows = 0

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._file.close()

    def add(self, row: FinishedRow) -> None:
        """Appends a row.

        Args:
            row: The row.
        """
        record = _NOTHING if row.record is None else row.record
        about = {"id": row.id, "kept": row.record is not None, "group": record.group, "notes": row.notes}
        self._about.append(json.dumps(about, default=str))
        self._rows.add("", record)
        self._size_bytes += record.size_bytes
        self.num_rows += 1
        if self._size_bytes >= BATCH_SIZE_BYTES or len(self._about) >= BATCH_MAX_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._about:
            return
        numbers = (self._rows.num_visual_tokens, self._rows.num_supervised_tokens)
        columns = [pa.array(self._about), *(pa.array(values, pa.int32()) for values in numbers)]
        self._file.write_batch(pa.record_batch([*columns, *self._rows.data_columns()], schema=_SCHEMA))
        self._rows, self._about, self._size_bytes = Batch(), [], 0


def read_part(path: Path) -> Iterator[FinishedRow]:
    """Yields the rows of a part in order; their pixels are views of the file.

    Args:
        path: Of the file, on this machine.
    """
    with pa.memory_map(str(path)) as mapped:
        for batch in pa.ipc.open_stream(mapped):
            yield from _rows(batch)


def _rows(batch: Any) -> Iterator[FinishedRow]:
    messages, targets, metadata = (batch.column(name).to_pylist() for name in ("messages", "target", "metadata"))
    names = ("input_ids", "assistant_spans", "image_shapes", "num_frames", "frames_per_second")
    ids, spans, shapes, frames, rates = (_Lists(batch.column(name)) for name in names)
    images = batch.column("pixels")
    image_bounds = _offsets(images, np.int32)
    byte_bounds = _offsets(images.values, np.int64)
    pixels = np.frombuffer(images.values.buffers()[2] or b"", np.uint8)
    num_visual, num_supervised = (batch.column(f"num_{kind}_tokens").to_pylist() for kind in ("visual", "supervised"))
    for row, about in enumerate(batch.column("about").to_pylist()):
        said = json.loads(about)
        record = None
        if said["kept"]:
            numbers = range(image_bounds[row], image_bounds[row + 1])
            record = Record(
                said["group"],
                messages[row],
                targets[row],
                metadata[row],
                ids[row],
                spans[row],
                shapes[row],
                frames[row],
                rates[row],
                [pixels[byte_bounds[number] : byte_bounds[number + 1]] for number in numbers],
                num_visual[row],
                num_supervised[row],
            )
        yield FinishedRow(said["id"], record, [Note(*note) for note in said["notes"]])


class _Lists:
    """A column of lists of numbers, each as an array."""

    def __init__(self, column: Any) -> None:
        self._bounds = _offsets(column, np.int32)
        self._values = column.values.to_numpy()

    def __getitem__(self, row: int) -> Any:
        return self._values[self._bounds[row] : self._bounds[row + 1]]


def _offsets(column: Any, dtype: type[np.integer[Any]]) -> np.ndarray:
    """Where each of a column's values begins, and where the last one ends."""
    return np.frombuffer(column.buffers()[1], dtype)[column.offset : column.offset + len(column) + 1]
