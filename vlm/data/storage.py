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
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Record:
    """A row in the form in which it is kept: texts are JSON, lists are flat.

    Attributes:
        group: Rows of equal group stay in one split; None if there is none.
        messages: The conversation as JSON.
        target: The answer to learn.
        metadata: Plain values as JSON.
        input_ids: Tokens.
        assistant_spans: Start and end of each range that carries loss, one after the other.
        image_shapes: Height, width and channels of each image, or of a video's frames.
        num_frames: Of each image, 0 for what is no video.
        frames_per_second: Of each video.
        pixels: Of each image or video, uint8, contiguous.
        num_visual_tokens: Image tokens.
        num_supervised_tokens: Tokens that carry loss.
    """

    group: str | None
    messages: str
    target: str
    metadata: str
    input_ids: Sequence[int]
    assistant_spans: Sequence[int]
    image_shapes: Sequence[int]
    num_frames: Sequence[int]
    frames_per_second: Sequence[float]
    pixels: Sequence[np.ndarray]
    num_visual_tokens: int
    num_supervised_tokens: int

    @classmethod
    def of(cls, sample: Sample) -> Record:
        """The record of a finished row.

        Args:
            sample: The row.
        """
        videos = {number: image for number, image in enumerate(sample.images) if isinstance(image, Video)}
        images = [image.frames if isinstance(image, Video) else image for image in sample.images]
        return cls(
            sample.group,
            _json(sample.messages),
            last_text(sample.messages),
            _json(sample.metadata) if sample.metadata else "{}",
            sample.input_ids,
            [bound for span in sample.assistant_spans for bound in span],
            [length for image in sample.images for length in image.shape[-3:]],
            [len(videos[number].frames) if number in videos else 0 for number in range(len(sample.images))],
            [video.frames_per_second for video in videos.values()],
            [np.ascontiguousarray(image) for image in images],
            sample.num_visual_tokens,
            sample.num_supervised_tokens,
        )

    @property
    def size_bytes(self) -> int:
        """Roughly what it takes on disk."""
        return sum(image.nbytes for image in self.pixels) + 4 * len(self.input_ids) + 512

    @property
    def num_pixels(self) -> int:
        """Of all images and frames."""
        sides = self.image_shapes
        return sum(
            int(sides[3 * number]) * int(sides[3 * number + 1]) * max(1, int(frames))
            for number, frames in enumerate(self.num_frames)
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
        self._rows = Batch()
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

    def add(self, row_id: str, record: Record) -> None:
        """Appends one row."""
        size_bytes = record.size_bytes
        if self._rows.ids and (
            self._rows_bytes + size_bytes > BATCH_SIZE_BYTES or len(self._rows.ids) >= BATCH_MAX_ROWS
        ):
            self._flush()
        self._rows.add(row_id, record)
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
        self._rows, self._rows_bytes = Batch(), 0

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
        if isinstance(values, np.ndarray):
            # Bytes are taken as they are, so they must be of the column's type.
            self.values.frombytes(np.asarray(values, self.values.typecode).tobytes())
        else:
            self.values.extend(values)
        self.lengths.append(len(values))

    def column(self) -> Any:
        values = pa.array(np.array(self.values, self.values.typecode))
        return pa.ListArray.from_arrays(_offsets(self.lengths, np.int32), values)


class Batch:
    """Rows of one batch as columns.

    Thousands of small rows kept as Python objects would send the garbage collector through the whole process time and again, and
    Arrow takes longer to read them value by value than a short line takes to resize.

    Attributes:
        ids: Ids of the rows.
        num_visual_tokens: Of each row.
        num_supervised_tokens: Of each row.
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
        self.num_visual_tokens: list[int] = []
        self.num_supervised_tokens: list[int] = []

    def add(self, row_id: str, record: Record) -> None:
        """Appends one row.

        Args:
            row_id: Its id.
            record: Its content.
        """
        self.ids.append(row_id)
        self._groups.append(record.group)
        self._messages.append(record.messages)
        self._targets.append(record.target)
        self._metadata.append(record.metadata)
        self._input_ids.add(record.input_ids)
        self._spans.add(record.assistant_spans)
        self._shapes.add(record.image_shapes)
        self._frames.add(record.num_frames)
        self._rates.add(record.frames_per_second)
        self._images += record.pixels
        self._num_images.append(len(record.pixels))
        self._num_pixels.append(record.num_pixels)
        self.num_visual_tokens.append(record.num_visual_tokens)
        self.num_supervised_tokens.append(record.num_supervised_tokens)

    def data_columns(self) -> list[Any]:
        """The columns of `DATA_SCHEMA`."""
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
        """The columns of `INDEX_SCHEMA`.

        Args:
            shard: Number of the file that holds the batch.
            batch: Its number there.
        """
        columns = {
            "id": self.ids,
            "group": self._groups,
            "num_tokens": self._input_ids.lengths,
            "num_visual_tokens": self.num_visual_tokens,
            "num_supervised_tokens": self.num_supervised_tokens,
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
    joined = b"".join([image.data for image in images])
    buffers = [None, offsets.buffers()[1], pa.py_buffer(joined)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(images), buffers)
