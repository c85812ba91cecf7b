"""How a prepared dataset lies on disk.

    summary.json          counts, for people and for the next steps
    ledger.jsonl          one line per dropped, shrunk or doubtful row
    train/index.arrow     one small record per row: lengths, id, group, and where its data lie
    train/data-00000.arrow, …   the rows themselves; pixels are raw uint8, so reading one maps it and copies nothing
    validation/…  test/…

Files are Arrow IPC without compression. Batches are cut by the size of their rows alone, so that the bytes do not depend on the
number of workers.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from vlm.data.messages import last_text
from vlm.data.rows import Sample

BATCH_SIZE_BYTES = 16 << 20
BATCH_MAX_ROWS = 4096
SHARD_SIZE_BYTES = 1 << 30

DATA_SCHEMA = pa.schema(
    [
        ("messages", pa.string()),
        ("target", pa.string()),
        ("metadata", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("assistant_spans", pa.list_(pa.int32())),
        ("image_shapes", pa.list_(pa.int32())),
        ("pixels", pa.list_(pa.large_binary())),
    ]
)
INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("group", pa.string()),
        ("num_tokens", pa.int32()),
        ("num_visual_tokens", pa.int32()),
        ("num_supervised_tokens", pa.int32()),
        ("num_images", pa.int32()),
        ("num_pixels", pa.int64()),
        ("shard", pa.int32()),
        ("batch", pa.int32()),
        ("offset", pa.int32()),
    ]
)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"data-{number:05d}.arrow"


class SplitWriter:
    """Writes one split; holds one batch in memory. Use as a context manager.

    Attributes:
        num_rows: Rows written so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[tuple[str, Sample]] = []
        self._rows_bytes = 0
        self._shard = -1
        self._shard_bytes = 0
        self._batch = 0
        self._data: Any = None
        self._index: Any = None
        self.num_rows = 0

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        for writer in (self._data, self._index):
            if writer is not None:
                writer.close()

    def add(self, row_id: str, sample: Sample) -> None:
        """Appends one row."""
        if self._rows and (
            self._rows_bytes + sample.size_bytes > BATCH_SIZE_BYTES or len(self._rows) >= BATCH_MAX_ROWS
        ):
            self._flush()
        self._rows.append((row_id, sample))
        self._rows_bytes += sample.size_bytes
        self.num_rows += 1

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._data is None or self._shard_bytes >= SHARD_SIZE_BYTES:
            self._next_shard()
        samples = [sample for _, sample in self._rows]
        self._data.write_batch(pa.record_batch(_data_columns(samples), schema=DATA_SCHEMA))
        self._index.write_batch(pa.record_batch(self._index_columns(), schema=INDEX_SCHEMA))
        self._shard_bytes += self._rows_bytes
        self._batch += 1
        self._rows, self._rows_bytes = [], 0

    def _next_shard(self) -> None:
        if self._data is not None:
            self._data.close()
        self._folder.mkdir(exist_ok=True)
        self._shard += 1
        self._shard_bytes = self._batch = 0
        self._data = pa.ipc.new_file(str(self._folder / shard_name(self._shard)), DATA_SCHEMA)
        if self._index is None:
            self._index = pa.ipc.new_file(str(self._folder / "index.arrow"), INDEX_SCHEMA)

    def _index_columns(self) -> list[Any]:
        rows = self._rows
        columns = {
            "id": [row_id for row_id, _ in rows],
            "group": [sample.group for _, sample in rows],
            "num_tokens": [len(sample.input_ids) for _, sample in rows],
            "num_visual_tokens": [sample.num_visual_tokens for _, sample in rows],
            "num_supervised_tokens": [sum(end - start for start, end in sample.assistant_spans) for _, sample in rows],
            "num_images": [len(sample.images) for _, sample in rows],
            "num_pixels": [sum(image.shape[0] * image.shape[1] for image in sample.images) for _, sample in rows],
            "shard": [self._shard] * len(rows),
            "batch": [self._batch] * len(rows),
            "offset": list(range(len(rows))),
        }
        return [pa.array(columns[field.name], field.type) for field in INDEX_SCHEMA]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _data_columns(samples: list[Sample]) -> list[Any]:
    columns = {
        "messages": [_json(sample.messages) for sample in samples],
        "target": [last_text(sample.messages) for sample in samples],
        "metadata": [_json(sample.metadata) for sample in samples],
        "input_ids": [sample.input_ids for sample in samples],
        "assistant_spans": [[bound for span in sample.assistant_spans for bound in span] for sample in samples],
        "image_shapes": [[length for image in sample.images for length in image.shape] for sample in samples],
        "pixels": [[image.tobytes() for image in sample.images] for sample in samples],
    }
    return [pa.array(columns[field.name], field.type) for field in DATA_SCHEMA]
