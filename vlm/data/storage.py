"""How a prepared dataset lies on disk.

    summary.json          counts, for people and for the next steps
    ledger.jsonl          one line per dropped, shrunk or doubtful row
    train/index.arrow     one small record per row: lengths, id, group, and where its data lie
    train/data-00000.arrow, …   the rows themselves; pixels are raw uint8, so reading one maps it and copies nothing;
                          videos lie among the images, with a number of frames that is not 0
    validation/…  test/…

Files are Arrow IPC without compression. Batches are cut by the size of their rows alone, so that the bytes do not depend on the
number of workers.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from vlm.data.messages import last_text
from vlm.data.rows import Sample
from vlm.families.video import Video

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
        ("num_frames", pa.list_(pa.int32())),
        ("frames_per_second", pa.list_(pa.float64())),
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
        self._rows = _Batch()
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
        size_bytes = sample.size_bytes
        if self._rows.ids and (
            self._rows_bytes + size_bytes > BATCH_SIZE_BYTES or len(self._rows.ids) >= BATCH_MAX_ROWS
        ):
            self._flush()
        self._rows.add(row_id, sample)
        self._rows_bytes += size_bytes
        self.num_rows += 1

    def _flush(self) -> None:
        if not self._rows.ids:
            return
        if self._data is None or self._shard_bytes >= SHARD_SIZE_BYTES:
            self._next_shard()
        self._data.write_batch(pa.record_batch(self._rows.data_columns(), schema=DATA_SCHEMA))
        self._index.write_batch(
            pa.record_batch(self._rows.index_columns(self._shard, self._batch), schema=INDEX_SCHEMA)
        )
        self._shard_bytes += self._rows_bytes
        self._batch += 1
        self._rows, self._rows_bytes = _Batch(), 0

    def _next_shard(self) -> None:
        if self._data is not None:
            self._data.close()
        self._folder.mkdir(exist_ok=True)
        self._shard += 1
        self._shard_bytes = self._batch = 0
        self._data = pa.ipc.new_file(str(self._folder / shard_name(self._shard)), DATA_SCHEMA)
        if self._index is None:
            self._index = pa.ipc.new_file(str(self._folder / "index.arrow"), INDEX_SCHEMA)


_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode


class _Lists:
    """A column of lists of numbers, as one run of values and their counts.

    Args:
        code: Type of the values, as in `array`.
    """

    def __init__(self, code: str = "i") -> None:
        self.values: array[Any] = array(code)
        self.lengths: list[int] = []

    def add(self, values: Sequence[float]) -> None:
        self.values.extend(values)
        self.lengths.append(len(values))

    def column(self) -> Any:
        values = pa.array(np.array(self.values, self.values.typecode))
        return pa.ListArray.from_arrays(_offsets(self.lengths, np.int32), values)


class _Batch:
    """Rows of one batch as columns.

    Thousands of small rows kept as Python objects would send the garbage collector through the whole process time and again, and
    Arrow takes longer to read them value by value than a short line takes to resize.

    Attributes:
        ids: Ids of the rows.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._groups: list[str | None] = []
        self._messages: list[str] = []
        self._targets: list[str] = []
        self._metadata: list[str] = []
        self._input_ids, self._spans, self._shapes = _Lists(), _Lists(), _Lists()
        self._frames, self._rates = _Lists(), _Lists("d")
        self._images: list[np.ndarray] = []
        self._num_images: list[int] = []
        self._num_pixels: list[int] = []
        self._num_visual: list[int] = []
        self._num_supervised: list[int] = []

    def add(self, row_id: str, sample: Sample) -> None:
        self.ids.append(row_id)
        self._groups.append(sample.group)
        self._messages.append(_json(sample.messages))
        self._targets.append(last_text(sample.messages))
        self._metadata.append(_json(sample.metadata) if sample.metadata else "{}")
        self._input_ids.add(sample.input_ids)
        self._spans.add([bound for span in sample.assistant_spans for bound in span])
        videos = {number: image for number, image in enumerate(sample.images) if isinstance(image, Video)}
        self._shapes.add([length for image in sample.images for length in image.shape[-3:]])
        self._frames.add(
            [len(videos[number].frames) if number in videos else 0 for number in range(len(sample.images))]
        )
        self._rates.add([video.frames_per_second for video in videos.values()])
        self._images += [image.frames if isinstance(image, Video) else image for image in sample.images]
        self._num_images.append(len(sample.images))
        self._num_pixels.append(sum(math.prod(image.shape[:-1]) for image in sample.images))
        self._num_visual.append(sample.num_visual_tokens)
        self._num_supervised.append(sample.num_supervised_tokens)

    def data_columns(self) -> list[Any]:
        columns = {
            "messages": self._messages,
            "target": self._targets,
            "metadata": self._metadata,
            "input_ids": self._input_ids.column(),
            "assistant_spans": self._spans.column(),
            "image_shapes": self._shapes.column(),
            "num_frames": self._frames.column(),
            "frames_per_second": self._rates.column(),
            "pixels": pa.ListArray.from_arrays(_offsets(self._num_images, np.int32), _pixels(self._images)),
        }
        return _in_schema(columns, DATA_SCHEMA)

    def index_columns(self, shard: int, batch: int) -> list[Any]:
        columns = {
            "id": self.ids,
            "group": self._groups,
            "num_tokens": self._input_ids.lengths,
            "num_visual_tokens": self._num_visual,
            "num_supervised_tokens": self._num_supervised,
            "num_images": self._num_images,
            "num_pixels": self._num_pixels,
            "shard": [shard] * len(self.ids),
            "batch": [batch] * len(self.ids),
            "offset": list(range(len(self.ids))),
        }
        return _in_schema(columns, INDEX_SCHEMA)


def _in_schema(columns: dict[str, Any], schema: Any) -> list[Any]:
    made = ((field, columns[field.name]) for field in schema)
    return [column if isinstance(column, pa.Array) else pa.array(column, field.type) for field, column in made]


def _offsets(lengths: list[int], dtype: type[np.integer[Any]]) -> Any:
    offsets = np.zeros(len(lengths) + 1, dtype)
    np.cumsum(lengths, out=offsets[1:])
    return pa.array(offsets)


def _pixels(images: list[np.ndarray]) -> Any:
    offsets = _offsets([image.nbytes for image in images], np.int64)
    joined = b"".join([np.ascontiguousarray(image).data for image in images])
    buffers = [None, offsets.buffers()[1], pa.py_buffer(joined)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(images), buffers)
