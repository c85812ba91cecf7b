"""What a fuzzer feeds with bytes: each target takes any bytes, and may refuse them only in the way that it promises.

Used by `tests/test_hostile_input.py` with a few mutations of good input, and by `benchmarks/fuzz.py` for as long as one likes.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import ValidationError

from artifacts.index import IndexRecord
from artifacts.manifest import FileEntry, Manifest
from artifacts.sealed import BrokenSealError, NewerSchemaError, seal
from flows.settings import describe
from flows.yaml_file import read_yaml
from vlm.config import DataConfig, RunConfig, SourceConfig
from vlm.data.images import open_image, pillow_limit, upright_image
from vlm.data.mapping import map_row, resolve_columns
from vlm.data.rows import RowError, UnreadableRow
from vlm.data.sources import open_streams
from vlm.data.video import VideoReference, load_video
from vlm.errors import ConfigError, DataError, ModelError
from vlm.loading.source import check_weights

# Small, so that a fuzzer spends its time on headers rather than on pixels.
MAX_PIXELS = 1 << 16
_DATA = DataConfig(max_source_pixels=MAX_PIXELS)


@dataclass(frozen=True)
class Target:
    """Something that reads what others wrote.

    Attributes:
        run: Takes any bytes; any error that it lets through is a fault.
        seeds: Good input.
    """

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def _image(data: bytes) -> None:
    with pillow_limit(MAX_PIXELS):
        try:
            image = upright_image(open_image(data, MAX_PIXELS))
        except RowError:
            return
    assert image.mode in ("L", "RGB")
    assert np.asarray(image).dtype == np.uint8
    assert 0 < image.width * image.height <= MAX_PIXELS


def _video(data: bytes) -> None:
    with pillow_limit(MAX_PIXELS):
        try:
            medium = load_video(
                VideoReference(data, None),
                load=lambda value: value,
                list_folder=lambda path: [],
                max_frames=4,
                max_source_pixels=MAX_PIXELS,
                max_pixels=None,
                max_total_pixels=4 * MAX_PIXELS,
            )
        except RowError:
            return
    assert 1 <= len(medium.frames) <= 4
    assert len({frame.size for frame in medium.frames}) == 1
    assert medium.frames_per_second is not None
    assert medium.frames_per_second > 0


def _table(name: str) -> Callable[[bytes], None]:
    """Reads a file of rows to its end, and maps each."""
    fs = fsspec.filesystem("memory")

    def run(data: bytes) -> None:
        fs.pipe_file(f"/hostile/{name}", data)
        try:
            for stream in open_streams((SourceConfig(path=f"memory://hostile/{name}"),)):
                columns = resolve_columns(_DATA.columns, stream)
                for row in stream.rows():
                    if isinstance(row, UnreadableRow):
                        continue
                    try:
                        mapped = map_row(row, columns, _DATA)
                    except RowError:
                        continue
                    json.dumps([mapped.id, mapped.group, mapped.messages, mapped.metadata], ensure_ascii=False).encode()
        except DataError:
            pass

    return run


class _File:
    """Looks like a path to `read_yaml`."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def open(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)

    def __str__(self) -> str:
        return "settings.yaml"


def _settings(data: bytes) -> None:
    try:
        content = read_yaml(_File(data))  # type: ignore[arg-type]
    except ConfigError:
        return
    assert isinstance(content, dict)
    try:
        RunConfig.model_validate(content)
    except ValidationError as error:
        message = describe(error, RunConfig)
    else:
        message = ""
    assert len(message) < 200_000


def _store(data: bytes) -> None:
    with contextlib.suppress(BrokenSealError, NewerSchemaError):
        IndexRecord.from_bytes(data)
    try:
        Manifest.from_bytes(data, "0" * 64)
    except (BrokenSealError, NewerSchemaError):
        return
    raise AssertionError("no content has this digest")


def _resealed(data: bytes) -> None:
    """Whatever JSON it is, under a seal and a digest that fit: only what the fields hold can be wrong."""
    from artifacts.keys import canonical_digest

    try:
        fields = json.loads(data)
        raw = seal(fields)
        digest = canonical_digest(fields["content"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return
    for read in (lambda: Manifest.from_bytes(raw, digest), lambda: IndexRecord.from_bytes(raw)):
        try:
            found = read()
        except BrokenSealError:
            continue
        assert not isinstance(found, Manifest) or not any(".." in Path(entry.path).parts for entry in found.files)


def _weights(folder: Path) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        from safetensors import deserialize

        (folder / "model.safetensors").write_bytes(data)
        try:
            check_weights(folder)
        except ModelError:
            return
        deserialize(data)  # what passed our check, safetensors takes

    return run


def _rows() -> list[dict[str, Any]]:
    image = encoded(Image.new("RGB", (5, 4), "red"), "PNG")
    return [
        {"id": "a", "image": {"bytes": image, "path": None}, "text": "one", "page": 1},
        {"id": "é", "image": None, "text": "two", "page": 2},
    ]


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _image_seeds() -> tuple[bytes, ...]:
    colour = Image.fromarray(np.arange(9 * 7 * 3, dtype=np.uint8).reshape(7, 9, 3))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    deep = Image.fromarray(np.arange(63, dtype=np.uint16).reshape(7, 9) * 1000)
    real = Image.fromarray(np.linspace(0, 1, 63, dtype=np.float32).reshape(7, 9))
    return (
        *(encoded(colour, name) for name in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")),
        *(encoded(colour, name, exif=exif) for name in ("PNG", "JPEG", "WEBP", "TIFF")),
        encoded(colour.convert("CMYK"), "JPEG"),
        encoded(colour, "JPEG", progressive=True),
        encoded(colour.convert("RGBA"), "PNG"),
        encoded(colour.convert("P"), "PNG", transparency=0),
        encoded(colour.convert("LA"), "PNG"),
        encoded(colour.convert("1"), "TIFF", compression="group4"),
        encoded(colour, "TIFF", compression="tiff_lzw"),
        encoded(colour, "TIFF", compression="jpeg"),
        encoded(deep, "PNG"),
        encoded(deep, "TIFF"),
        encoded(real, "TIFF"),
        encoded(colour, "WEBP", lossless=True),
    )


def _video_seeds() -> tuple[bytes, ...]:
    frames = [Image.new("RGB", (8, 6), (shade, 0, 255 - shade)) for shade in (0, 80, 160, 240, 250)]
    rest = {"save_all": True, "append_images": frames[1:], "duration": 40}
    return (
        *(encoded(frames[0], name, **rest) for name in ("GIF", "WEBP", "PNG")),
        encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
    )


def _arrow(new: Any, table: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    with new(sink, table.schema, **options) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _parquet(table: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def safetensors(header: dict[str, Any] | bytes, size_bytes: int) -> bytes:
    """A file with that header, whatever it says, and so many bytes behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size_bytes)


def targets(folder: Path) -> dict[str, Target]:
    """All targets by name.

    Args:
        folder: For those that read from a disk.
    """
    rows = _rows()
    table = pa.Table.from_pylist(rows)
    lines = b"".join(json.dumps({**row, "image": "a.png"}).encode() + b"\n" for row in rows)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}, {"role": "assistant", "content": "y"}]  # fmt: skip
    talks = json.dumps({"messages": talk, "image": "a.png"}).encode() + b"\n"
    cells = 'id,image,text\na,a.png,"one, two"\nb,"[""a.png""]",3\n'.encode("utf-8-sig")
    settings = b"data: &d\n  prompt: Read it.\n  sources: [{path: rows.jsonl, max_rows: 3}]\ntraining: {epochs: 2, learning_rate: 1.0e-4}\n"
    document = {
        "unit": "u", "key": "0" * 64, "document": {}, "outputs": {}, "info": {}, "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    entry = FileEntry("a/b", 3, "a" * 64)
    content = {"kind": "dataset", "files": [vars(entry)], "metadata": {"a": 1}}
    (folder / "weights").mkdir(exist_ok=True)
    tensors = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
    }
    return {
        "image": Target(_image, _image_seeds()),
        "video": Target(_video, _video_seeds()),
        "jsonl": Target(_table("rows.jsonl"), (lines, talks)),
        "jsonl_gz": Target(_table("rows.jsonl.gz"), (gzip.compress(lines, mtime=0),)),
        "csv": Target(_table("rows.csv"), (cells,)),
        "parquet": Target(_table("rows.parquet"), (_parquet(table), _parquet(table, compression="zstd"))),
        "arrow": Target(
            _table("rows.arrow"),
            (
                _arrow(pa.ipc.new_file, table),
                _arrow(pa.ipc.new_stream, table),
                _arrow(pa.ipc.new_file, table, options=pa.ipc.IpcWriteOptions(compression="lz4")),
            ),
        ),
        "settings": Target(_settings, (settings, b"data: {split: {seed: 3}}\nlora: {rank: 8}\n")),
        "store": Target(_store, (seal(document), seal({"content": content, "provenance": {}}))),
        "resealed": Target(_resealed, (json.dumps({"content": content, "provenance": {}, **document}).encode(),)),
        "weights": Target(_weights(folder / "weights"), (safetensors(tensors, 28),)),
    }
