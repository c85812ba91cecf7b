"""Reads a prepared dataset: map-style, memory-mapped, without torch."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlm.data.storage import shard_name
from vlm.errors import DataError
from vlm.families.video import Video

_OPEN_BATCHES = 32


@dataclass(frozen=True)
class PreparedRow:
    """One row as it is trained on.

    Attributes:
        id: Unique within the dataset.
        group: Rows of equal group are in one split; None if the source gave none.
        messages: OpenAI-style turns with lists of parts; ``{"type": "image"}`` and ``{"type": "video"}`` parts stand for
            `images` in order.
        images: Arrays of shape [height, width, 3], uint8, at target size, and videos of such frames. Colour images are read-only views of the mapped file.
        input_ids: Token ids of shape [num_tokens], int32, image placeholders included.
        assistant_spans: Half-open token ranges that carry loss under assistant-only loss.
        target: Text of the last assistant turn.
        metadata: Plain values of the source's other columns.
    """

    id: str
    group: str | None
    messages: list[dict[str, Any]]
    images: list[np.ndarray | Video]
    input_ids: np.ndarray
    assistant_spans: list[tuple[int, int]]
    target: str
    metadata: dict[str, Any]


class PreparedDataset:
    """Rows of one split of a `dataset` artifact.

    Files are mapped when first read, in whichever process that happens: instances can be pickled and survive a fork.

    Args:
        dataset_dir: Folder that step 3 wrote.
        split: ``"train"``, ``"validation"`` or ``"test"``. A split without rows has length 0.

    Raises:
        DataError: If the folder is no prepared dataset or the split is unknown.
    """

    def __init__(self, dataset_dir: Path, split: str) -> None:
        self.dataset_dir = Path(dataset_dir)
        self.split = split
        summary_path = self.dataset_dir / "summary.json"
        if not summary_path.is_file():
            raise DataError(
                f"{str(dataset_dir)!r} is not a prepared dataset: it has no summary.json. Run step 3 (prepare_dataset) first."
            )
        rows_by_split = json.loads(summary_path.read_text(encoding="utf-8"))["num_rows"]
        if split not in rows_by_split:
            raise DataError(f"split {split!r} is unknown; this dataset has {', '.join(rows_by_split)}.")
        self._num_rows = int(rows_by_split[split])
        self._reset()

    def _reset(self) -> None:
        self._index: dict[str, Any] | None = None
        self._shards: dict[int, Any] = {}
        self._batches: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset_dir": self.dataset_dir, "split": self.split, "_num_rows": self._num_rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> PreparedRow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of split {self.split!r}, which has {len(self)} rows")
        position = int(index) % len(self)
        columns = self._columns()
        batch, row = (
            self._batch(int(columns["shard"][position]), int(columns["batch"][position])),
            int(columns["offset"][position]),
        )
        spans = _numbers(batch, "assistant_spans", row).reshape(-1, 2)
        return PreparedRow(
            id=columns["id"][position].as_py(),
            group=columns["group"][position].as_py(),
            messages=json.loads(batch.column("messages")[row].as_py()),
            images=_images(batch, row),
            input_ids=_numbers(batch, "input_ids", row),
            assistant_spans=[(int(start), int(end)) for start, end in spans],
            target=batch.column("target")[row].as_py(),
            metadata=json.loads(batch.column("metadata")[row].as_py()),
        )

    def __iter__(self) -> Iterator[PreparedRow]:
        return (self[index] for index in range(len(self)))

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens of every row, image tokens included: shape [num_rows]. Reads no pixel, like the other columns."""
        return self._numpy("num_tokens")

    @property
    def num_visual_tokens(self) -> np.ndarray:
        """Image tokens of every row: shape [num_rows]."""
        return self._numpy("num_visual_tokens")

    @property
    def num_supervised_tokens(self) -> np.ndarray:
        """Tokens with assistant-only loss of every row: shape [num_rows]."""
        return self._numpy("num_supervised_tokens")

    @property
    def num_images(self) -> np.ndarray:
        """Images of every row: shape [num_rows]."""
        return self._numpy("num_images")

    @property
    def num_pixels(self) -> np.ndarray:
        """Pixels of every row's images together, at target size: shape [num_rows]."""
        return self._numpy("num_pixels")

    @property
    def ids(self) -> list[str]:
        """Ids of all rows."""
        return list(self._columns()["id"].to_pylist())

    def image_sizes(self, index: int) -> list[tuple[int, ...]]:
        """(height, width) in pixels of one row's images, (frames, height, width) of its videos, without reading them."""
        columns = self._columns()
        batch = self._batch(int(columns["shard"][index]), int(columns["batch"][index]))
        return [shape[:-1] for shape in _shapes(batch, int(columns["offset"][index]))]

    def _numpy(self, name: str) -> np.ndarray:
        return self._columns()[name].copy()

    def _columns(self) -> dict[str, Any]:
        if self._index is None:
            if self._num_rows == 0:
                self._index = {
                    name: np.zeros(0, np.int64)
                    for name in ("num_tokens", "num_visual_tokens", "num_supervised_tokens", "num_images")
                }
                self._index |= {"num_pixels": np.zeros(0, np.int64), "id": pa.array([], pa.string())}
                return self._index
            table = (
                pa.ipc.open_file(pa.memory_map(str(self.dataset_dir / self.split / "index.arrow")))
                .read_all()
                .combine_chunks()
            )
            chunks = {name: table.column(name).chunk(0) for name in table.column_names}
            self._index = {
                name: chunk if name in ("id", "group") else chunk.to_numpy() for name, chunk in chunks.items()
            }
        return self._index

    def _batch(self, shard: int, batch: int) -> Any:
        key = (shard, batch)
        if key not in self._batches:
            if shard not in self._shards:
                self._shards[shard] = pa.ipc.open_file(
                    pa.memory_map(str(self.dataset_dir / self.split / shard_name(shard)))
                )
            self._batches[key] = self._shards[shard].get_batch(batch)
            while len(self._batches) > _OPEN_BATCHES:
                self._batches.popitem(last=False)
        self._batches.move_to_end(key)
        return self._batches[key]


def _numbers(batch: Any, name: str, row: int) -> np.ndarray:
    """One row of a list column, without going through Python numbers."""
    column = batch.column(name)
    start, end = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    return np.asarray(column.values[start:end].to_numpy())


def _shapes(batch: Any, row: int) -> list[tuple[int, ...]]:
    """Frames (videos only), height, width and channels of each image."""
    shapes = _numbers(batch, "image_shapes", row).reshape(-1, 3).tolist()
    frames = _numbers(batch, "num_frames", row).tolist()
    return [(number, *shape) if number else tuple(shape) for number, shape in zip(frames, shapes, strict=True)]


def _images(batch: Any, row: int) -> list[np.ndarray | Video]:
    column = batch.column("pixels")
    first = column.offsets[row].as_py()
    rates = iter(_numbers(batch, "frames_per_second", row).tolist())
    images: list[np.ndarray | Video] = []
    for number, shape in enumerate(_shapes(batch, row)):
        pixels = np.frombuffer(column.values[first + number].as_buffer(), np.uint8).reshape(shape)
        pixels = np.broadcast_to(pixels, (*shape[:-1], 3)) if shape[-1] == 1 else pixels  # seen three times, no copy
        images.append(Video(pixels, next(rates)) if len(shape) == 4 else pixels)
    return images
