"""Streams rows out of a text: JSON lines or CSV, compressed or not; from any line on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fsspec.spec import AbstractBufferedFile

from vlm.data.ranges import Cutter, PartSize, RowRange
from vlm.data.rows import Row, UnreadableRow
from vlm.errors import DataError

_READ_BUFFER_BYTES = 1 << 20
_CSV_FIELD_LIMIT = 1 << 26
# Room for an image of the largest size in base64. A compressed file of a few megabytes can hold a longer one.
MAX_LINE_BYTES = 1 << 30


def jsonl_rows(fs: Any, path: str, part: RowRange) -> Iterator[Row | UnreadableRow]:
    """Yields rows of a file of JSON lines.

    Args:
        fs: fsspec file system.
        path: Path on it.
        part: Where to begin; its number of rows is left to the caller.
    """
    with _opened(fs, path, part.at) as lines:
        first = part.at == 0
        for _, line in _jsonl_lines(lines):
            if line is None:
                yield UnreadableRow(
                    "row_too_large", f"this line is over {MAX_LINE_BYTES >> 20} MiB; keep images in files of their own"
                )
                continue
            if first and line.startswith(b"["):
                raise DataError(
                    f"{path!r} is one JSON array; rows are read one per line. Convert it: jq -c '.[]' {path} > rows.jsonl"
                )
            first = False
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield UnreadableRow("bad_json", f"this line is not JSON: {error}")
                continue
            yield (
                row
                if isinstance(row, dict)
                else UnreadableRow("bad_json", f"this line is a JSON {type(row).__name__}, not an object with columns")
            )


def _jsonl_lines(lines: Any) -> Iterator[tuple[int, bytes | None]]:
    """Bytes read up to the end of a line, and the line, if it is not blank; None for one that is too long."""
    num_bytes = 0
    while line := lines.readline(MAX_LINE_BYTES):
        num_bytes += len(line)
        if len(line) >= MAX_LINE_BYTES and not line.endswith(b"\n"):
            num_bytes += _skip_line(lines)
            yield num_bytes, None
        elif stripped := line.removeprefix(b"\xef\xbb\xbf").strip():
            yield num_bytes, stripped


def cut_jsonl(fs: Any, path: str, size: PartSize) -> Iterator[RowRange]:
    """Divides a file of JSON lines into ranges by its lines.

    Args:
        fs: fsspec file system.
        path: Path on it.
        size: Of a range.
    """
    cutter = Cutter(0, size)
    with _opened(fs, path) as lines:
        for end, _ in _jsonl_lines(lines):
            yield from cutter.row(end)
    yield from cutter.rest()


@contextmanager
def _opened(fs: Any, path: str, at: int = 0) -> Iterator[Any]:
    """A file that gives lines of at most a length, which remote ones do not by themselves; from a byte on.

    In a compressed one, all before that byte is decompressed once more.
    """
    with fs.open(path, "rb", compression="infer") as raw:
        if at:
            raw.seek(at)
        yield io.BufferedReader(raw) if isinstance(raw, AbstractBufferedFile) else raw


def _skip_line(lines: Any) -> int:
    """Passes over the rest of a line; returns its bytes."""
    num_bytes = 0
    while piece := lines.readline(_READ_BUFFER_BYTES):
        num_bytes += len(piece)
        if piece.endswith(b"\n"):
            break
    return num_bytes


def _bounded_lines(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(MAX_LINE_BYTES):
        if len(line) >= MAX_LINE_BYTES and not line.endswith("\n"):
            raise DataError(
                f"the file has a line of over {MAX_LINE_BYTES >> 20} MiB; keep images in files of their own, or save as parquet"
            )
        yield line


@contextmanager
def _text_input(fs: Any, path: str, at: int = 0) -> Iterator[io.TextIOWrapper]:
    with (
        _opened(fs, path, at) as raw,
        io.TextIOWrapper(raw, encoding="utf-8" if at else "utf-8-sig", newline="") as text,
    ):
        yield text


def _delimiter(path: str) -> str:
    return "\t" if ".tsv" in path.rsplit("/", 1)[-1].lower() else ","


def _csv_reader(lines: Iterator[str], path: str) -> Any:
    # The limit is process-wide, so it is only ever raised; ready conversations exceed the default of 128 KiB.
    csv.field_size_limit(max(csv.field_size_limit(), _CSV_FIELD_LIMIT))
    return csv.reader(lines, delimiter=_delimiter(path))


def csv_rows(fs: Any, path: str, part: RowRange) -> Iterator[Row | UnreadableRow]:
    """Yields rows of a CSV file, or of one with tabs if it is named so.

    Args:
        fs: fsspec file system.
        path: Path on it.
        part: Where to begin; its number of rows is left to the caller.
    """
    with ExitStack() as stack:
        text = stack.enter_context(_text_input(fs, path))
        reader = _csv_reader(_bounded_lines(text), path)
        header: list[str] = next(reader, [])
        if part.at:
            text = stack.enter_context(_text_input(fs, path, part.at))
            reader = _csv_reader(_bounded_lines(text), path)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                line = part.line + reader.line_num
                yield UnreadableRow("bad_csv", f"line {line} has {len(cells)} cells, the header has {len(header)}")
                continue
            yield dict(zip(header, cells, strict=True))


def cut_csv(fs: Any, path: str, size: PartSize) -> Iterator[RowRange]:
    """Divides a CSV file into ranges by its records.

    Args:
        fs: fsspec file system.
        path: Path on it.
        size: Of a range.
    """
    with _opened(fs, path) as raw:
        # Read before the text is, since decoding drops it.
        num_bytes = 3 if raw.read(3) == b"\xef\xbb\xbf" else 0

    def counted(lines: Iterator[str]) -> Iterator[str]:
        nonlocal num_bytes
        for line in lines:
            num_bytes += len(line.encode())
            yield line

    with _text_input(fs, path) as text:
        reader = _csv_reader(counted(_bounded_lines(text)), path)
        next(reader, [])
        cutter = Cutter(num_bytes, size, reader.line_num)
        for cells in reader:
            if cells:
                yield from cutter.row(num_bytes, reader.line_num)
        yield from cutter.rest()


def csv_header(fs: Any, path: str) -> list[str]:
    """The first line of a CSV file; empty where there is none.

    Args:
        fs: fsspec file system.
        path: Path on it.
    """
    with _text_input(fs, path) as text:
        return next(_csv_reader(_bounded_lines(text), path), [])
