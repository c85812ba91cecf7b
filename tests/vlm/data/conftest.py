"""A small stand-in for a model's processing, rows in every format, and a short way to prepare them."""

from __future__ import annotations

import io
import json
import math
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from vlm.config.data import DataConfig
from vlm.data.prepare import prepare_dataset
from vlm.data.prepared import PreparedDataset
from vlm.data.sink import DatasetSummary

TOKENS_PER_IMAGE_AREA = 28 * 28


@dataclass(frozen=True)
class FakeEncoded:
    input_ids: list[int]
    assistant_spans: list[tuple[int, int]]
    num_visual_tokens: int


class FakeProcessing:
    """One token per byte of text and per 28 x 28 pixels; sides are multiples of 28."""

    context_length_tokens: int | None = 4096
    box_convention = "absolute"
    video_problem: str | None = None

    def target_size(self, height, width, min_pixels=None, max_pixels=None):
        low, high = min_pixels or 28 * 28, max_pixels or 1 << 20
        target = max(28, round(height / 28) * 28), max(28, round(width / 28) * 28)
        if math.prod(target) > high:
            scale = math.sqrt(height * width / high)
            target = max(28, math.floor(height / scale / 28) * 28), max(28, math.floor(width / scale / 28) * 28)
        elif math.prod(target) < low:
            scale = math.sqrt(low / (height * width))
            target = math.ceil(height * scale / 28) * 28, math.ceil(width * scale / 28) * 28
        return target

    def resize_image(self, image, size):
        return np.asarray(image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC))

    def encode(self, messages, image_sizes, add_generation_prompt=False):
        ids, spans, num_visual, sizes = [], [], 0, list(image_sizes)
        for message in messages:
            ids.append(1)
            start = len(ids)
            for part in message["content"]:
                if part["type"] in ("image", "video"):
                    size = sizes.pop(0)
                    assert len(size) == (2 if part["type"] == "image" else 3)
                    count = math.prod(size) // TOKENS_PER_IMAGE_AREA
                    num_visual += count
                    ids += [2] * count
                else:
                    ids += [10 + byte for byte in part["text"].encode()]
            ids.append(3)
            if message["role"] == "assistant":
                spans.append((start, len(ids)))
        assert not sizes
        return FakeEncoded(ids, spans, num_visual)


@pytest.fixture
def processing() -> FakeProcessing:
    return FakeProcessing()


def draw(seed: int, size: tuple[int, int] = (60, 40), mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.fixture
def make_image() -> Callable[..., Image.Image]:
    return draw


@pytest.fixture
def make_png() -> Callable[..., bytes]:
    return lambda seed=0, size=(60, 40), mode="RGB": encoded(draw(seed, size, mode))


@pytest.fixture
def encode_image() -> Callable[..., bytes]:
    return encoded


@pytest.fixture(scope="session")
def make_rows() -> Callable[[int], list[dict[str, Any]]]:
    """Rows with embedded images of several sizes: three to a group."""

    def make(count: int) -> list[dict[str, Any]]:
        return [
            {
                "id": f"row-{index}",
                "group": f"group-{index // 3}",
                "image": encoded(
                    draw(index, (40 + 7 * (index % 5), 30 + 5 * (index % 4)), "L" if index % 2 else "RGB")
                ),
                "question": f"What is number {index}?",
                "text": f"answer {index} é",
                "page": index,
            }
            for index in range(count)
        ]

    return make


@dataclass(frozen=True)
class Prepared:
    folder: Path
    summary: DatasetSummary

    @property
    def ledger(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "ledger.jsonl").read_text("utf-8").splitlines()]

    @property
    def reasons(self) -> list[tuple[str, str]]:
        return [(entry["action"], entry["reason"]) for entry in self.ledger]

    def split(self, name: str) -> PreparedDataset:
        return PreparedDataset(self.folder, name)

    def all_rows(self) -> dict[str, Any]:
        return {row.id: row for split in ("train", "validation", "test") for row in self.split(split)}


@pytest.fixture
def prepare(tmp_path_factory: pytest.TempPathFactory, processing: FakeProcessing) -> Callable[..., Prepared]:
    """Prepares `data` settings into a new folder; a path given alone is all train."""

    def run(
        path: Any = None, *, num_workers: int = 0, required_splits: tuple[str, ...] = (), **settings: Any
    ) -> Prepared:
        folder = tmp_path_factory.mktemp("dataset")
        if path is not None:
            settings.setdefault("sources", [{"path": str(path), "split": "train"}])
        data = DataConfig.model_validate({"max_dropped_fraction": 1.0, **settings})
        made = prepare_dataset(data, processing, folder, num_workers=num_workers, required_splits=required_splits)
        return Prepared(folder, made)

    return run


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(rows: list[dict[str, Any]], name: str = "rows.parquet", **options: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path, **options)
        return path

    return write


@pytest.fixture(params=["file", "memory"])
def folder_address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty folder, on disk and in fsspec's memory."""
    if request.param == "file":
        (tmp_path / "source").mkdir()
        yield str(tmp_path / "source")
    else:
        name = f"/{uuid.uuid4().hex}"
        fs = fsspec.filesystem("memory")
        fs.makedirs(name)
        yield f"memory:/{name}"
        fs.rm(name, recursive=True)
