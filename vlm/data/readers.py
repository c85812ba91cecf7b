"""Streams rows out of one file: parquet, Arrow, JSON lines or CSV; a few rows in memory at a time.

Rows hold images, so batches are sized by bytes, not by count. pyarrow is imported here: only a step that runs comes by.
"""

from __future__ import annotations

import csv
import itertools
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlm.data import texts
from vlm.data.locations import is_local
from vlm.data.ranges import WHOLE, PartSize, RowRange, cut_units
from vlm.data.rows import Row, UnreadableRow
from vlm.errors import DataError

BATCH_SIZE_BYTES = 4 << 20
_MAX_ROWS_PER_BATCH = 1024
_READ_BUFFER_BYTES = 1 << 20
# What rows may take together where one stored value can stand in many of them.
_MAX_REPEATED_BYTES = 2 << 30
_PEEKED_ROWS = 50


# What archives and compressed files raise where they are damaged, encrypted or packed in an unknown way; and file systems.
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


def read_rows(fs: Any, path: str, file_format: str, part: RowRange = WHOLE) -> Iterator[Row | UnreadableRow]:
    """Yields the rows of one file in order.

    Args:
        fs: fsspec file system.
        path: Path on it.
        file_format: ``"parquet"``, ``"arrow"``, ``"jsonl"`` or ``"csv"``.
        part: Which rows, as `cut_rows` gives them.

    Raises:
        DataError: If the file as a whole cannot be read.
    """
    reader = {"parquet": _parquet_rows, "arrow": _arrow_rows, "jsonl": texts.jsonl_rows, "csv": texts.csv_rows}[
        file_format
    ]
    with _named_errors(path, file_format):
        yield from part.of(reader(fs, path, part))


def cut_rows(fs: Any, path: str, file_format: str, size: PartSize, counted: bool) -> Iterator[RowRange]:
    """Divides the rows of one file into ranges, each of which can be read alone; no row is parsed where that can be avoided.

    Parquet is cut by its footer, Arrow by its batches; texts are gone through once. What lies elsewhere and would have to be
    fetched as a whole for that, an Arrow file, is one range.

    Args:
        fs: fsspec file system.
        path: Path on it.
        file_format: As of `read_rows`.
        size: Of a range.
        counted: Whether each range must say how many rows it has.

    Raises:
        DataError: If the file as a whole cannot be read.
    """
    if file_format == "arrow" and not counted and not is_local(fs):
        yield WHOLE
        return
    cut = {"parquet": _cut_parquet, "arrow": _cut_arrow, "jsonl": texts.cut_jsonl, "csv": texts.cut_csv}[file_format]
    with _named_errors(path, file_format):
        yield from cut(fs, path, size)


@contextmanager
def _named_errors(path: str, file_format: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, *UNREADABLE, csv.Error, OverflowError, RecursionError) as error:
        remedy = (
            "Save it as UTF-8."
            if isinstance(error, UnicodeError)
            else "It may be cut short, damaged, or hold values that Python has no type for: fetch or write it again."
        )
        raise DataError(f"{path!r} cannot be read as {file_format}: {error}. {remedy}") from error


def columns_of(fs: Any, path: str, file_format: str) -> list[str]:
    """Names of a file's columns: from its schema or header, for JSON lines from its first rows.

    Raises:
        DataError: If the file cannot be read.
    """
    with _named_errors(path, file_format):
        if file_format == "parquet":
            with _arrow_input(fs, path) as handle:
                return list(pq.ParquetFile(handle).schema_arrow.names)
        if file_format == "arrow":
            with _arrow_input(fs, path) as handle:
                return list(_ipc_reader(handle).schema.names)
        if file_format == "csv":
            return texts.csv_header(fs, path)
        names: dict[str, None] = {}
        for row in itertools.islice(texts.jsonl_rows(fs, path, WHOLE), _PEEKED_ROWS):
            if isinstance(row, dict):
                names.update(dict.fromkeys(row))
        return list(names)


@contextmanager
def _arrow_input(fs: Any, path: str) -> Iterator[Any]:
    """Opens for pyarrow: memory-mapped where it can be, so that skipped bytes are never read."""
    if is_local(fs):
        with pa.memory_map(path) as mapped:
            yield mapped
    else:
        with fs.open(path, "rb") as handle:
            yield handle


def _clipped(batches: Iterable[Any], part: RowRange) -> Iterator[Any]:
    """The batches from which a range reads, without the rows before and behind it."""
    skip, left = part.skip, part.num_rows
    for batch in batches:
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        batch = batch.slice(skip) if left is None else batch.slice(skip, left)
        skip = 0
        yield batch
        if left is not None:
            left -= batch.num_rows
            if left <= 0:
                return


def _parquet_rows(fs: Any, path: str, part: RowRange) -> Iterator[Row]:
    # A mapped parquet file would count every page it touched as memory in use, hence plain buffered reads.
    source = pa.OSFile(path) if is_local(fs) else fs.open(path, "rb")
    with source as handle:
        file = pq.ParquetFile(handle, pre_buffer=False, buffer_size=_READ_BUFFER_BYTES)
        labels = _label_names(file.schema_arrow)
        for batch in _clipped(_parquet_batches(file, part.at), part):
            yield from _with_labels(batch, labels)


def _parquet_batches(file: Any, first_group: int) -> Iterator[Any]:
    for group in range(first_group, file.metadata.num_row_groups):
        info = file.metadata.row_group(group)
        if info.num_rows == 0:
            continue
        # A value of a dictionary may stand in every row. (What single columns say of themselves is not asked for: where
        # that is damaged, pyarrow ends the process.)
        batch_rows = _rows_per_batch(info.total_byte_size, info.num_rows, info.total_byte_size)
        yield from file.iter_batches(batch_size=batch_rows, row_groups=[group], use_threads=False)


def _cut_parquet(fs: Any, path: str, size: PartSize) -> Iterator[RowRange]:
    with _arrow_input(fs, path) as handle:
        metadata = pq.ParquetFile(handle).metadata
        groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
        units = [(group.num_rows, group.total_byte_size) for group in groups]
    yield from cut_units(units, size)


def _ipc_reader(handle: Any) -> Any:
    magic = handle.read(6)
    handle.seek(0)
    return pa.ipc.open_file(handle) if magic == b"ARROW1" else pa.ipc.open_stream(handle)


def _arrow_rows(fs: Any, path: str, part: RowRange) -> Iterator[Row]:
    with _arrow_input(fs, path) as handle:
        reader = _ipc_reader(handle)
        labels = _label_names(reader.schema)
        for batch in _clipped(_small_batches(_arrow_batches(reader, part.at)), part):
            yield from _with_labels(batch, labels)


def _arrow_batches(reader: Any, first: int) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(index) for index in range(first, reader.num_record_batches))
    return itertools.islice(reader, first, None)


def _small_batches(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if batch.num_rows == 0:
            continue
        # A file may say that a value starts anywhere in memory.
        batch.validate(full=True)
        repeated = batch.nbytes if any(_repeats(field.type) for field in batch.schema) else 0
        step = _rows_per_batch(batch.nbytes, batch.num_rows, repeated)
        for start in range(0, batch.num_rows, step):
            yield batch.slice(start, step)


def _cut_arrow(fs: Any, path: str, size: PartSize) -> Iterator[RowRange]:
    with _arrow_input(fs, path) as handle:
        # Sizes of buffers, since they say nothing about values, which nobody has validated yet.
        units = ((batch.num_rows, batch.get_total_buffer_size()) for batch in _arrow_batches(_ipc_reader(handle), 0))
        yield from cut_units(units, size)


def _rows_per_batch(size_bytes: int, num_rows: int, repeated_bytes: int) -> int:
    """Rows whose values fit into a batch by their average, and into memory should each hold what is stored but once."""
    by_average = BATCH_SIZE_BYTES * num_rows // max(1, size_bytes)
    return max(1, min(_MAX_ROWS_PER_BATCH, by_average, _MAX_REPEATED_BYTES // max(1, repeated_bytes)))


def _repeats(kind: Any) -> bool:
    """Whether values of an Arrow type may share what they are stored as."""
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind) or types.is_string_view(kind):
        return True
    if types.is_binary_view(kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        return True
    return any(_repeats(kind.field(index).type) for index in range(kind.num_fields))


def _label_names(schema: Any) -> dict[str, list[str]]:
    """Class names of integer label columns, which `datasets` keeps in the schema's metadata."""
    packed = (schema.metadata or {}).get(b"huggingface")
    if packed is None:
        return {}
    try:
        features = dict(json.loads(packed).get("info", {}).get("features", {}))
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"the features that 'datasets' keeps in a schema's metadata are damaged ({error}); write the file again"
        ) from error


def _with_labels(batch: Any, labels: dict[str, list[str]]) -> Iterator[Row]:
    for row in batch.to_pylist():
        for name, names in labels.items():
            value = row.get(name)
            if type(value) is int and 0 <= value < len(names):
                row[name] = names[value]
        yield row
