"""Opens the sources of a dataset as streams of rows, whatever they are kept in."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vlm.config.data import SourceConfig
from vlm.data.images import ImageFolder
from vlm.data.locations import DataFile, Location, is_local, resolve
from vlm.data.ranges import WHOLE, PartSize, RowRange, cut_evenly
from vlm.data.rows import Row, UnreadableRow
from vlm.errors import DataError


@dataclass(frozen=True)
class RowStream:
    """The rows of one file, or of one split of a Hub dataset.

    Attributes:
        source: Index into ``data.sources``.
        label: Name of the stream in the ledger; the same wherever the source lies.
        split: Split that its source or its name puts its rows in; None divides them by hash.
        columns: Names of its columns, known before a row is read.
        folder: Where relative image paths lead, or None if there is no such place.
        rows: Starts reading from the first row, or gives those of a range.
        max_rows: Most rows to take from this source and split.
        num_rows: How many there are, if that is known, for the progress bar.
        cut: Divides the rows into ranges of about a size, each with a number of rows if that is asked for; None where they can
            only be read from the first one.
        local_file: Path of the file that they are in, if it is on this machine.
    """

    source: int
    label: str
    split: str | None
    columns: tuple[str, ...]
    folder: ImageFolder | None
    rows: Callable[..., Iterator[Row | UnreadableRow]]
    max_rows: int | None = None
    num_rows: int | None = None
    cut: Callable[[PartSize, bool], Iterator[RowRange]] | None = None
    local_file: str | None = None


class RowQuota:
    """Counts rows of sources that are taken in part only."""

    def __init__(self) -> None:
        self._taken: dict[tuple[int, str | None], int] = {}

    def left(self, stream: RowStream) -> int | None:
        """How many rows may still be taken from a stream; None for any number.

        Args:
            stream: One of its source's.
        """
        if stream.max_rows is None:
            return None
        return max(0, stream.max_rows - self._taken.get((stream.source, stream.split), 0))

    def take(self, stream: RowStream, num_rows: int) -> None:
        """Counts rows as taken.

        Args:
            stream: Where they come from.
            num_rows: How many.
        """
        key = (stream.source, stream.split)
        self._taken[key] = self._taken.get(key, 0) + num_rows


def num_rows_known(streams: list[RowStream]) -> int | None:
    """Rows of all streams, if all of them know it.

    Args:
        streams: Of a dataset.
    """
    totals = [stream.num_rows for stream in streams]
    return None if None in totals else sum(filter(None, totals))


def open_streams(sources: tuple[SourceConfig, ...], *, follow_links: bool = False) -> list[RowStream]:
    """Resolves every source, reads column names, and decides which names count as splits. Reads no row.

    Names give splits only if, with the explicit ones, they tell at least two apart: a dataset of nothing but ``train.parquet``
    is divided by hash.

    Args:
        sources: Where rows come from.
        follow_links: Whether symbolic links to images may leave a source's folder.

    Raises:
        DataError: If a source is missing or unreadable.
    """
    streams = [
        stream for index, source in enumerate(sources) for stream in _open(source, index, len(sources), follow_links)
    ]
    explicit = [source.split for source in sources]
    named = {explicit[stream.source] or stream.split for stream in streams} - {None}
    trusts_names = len(named) > 1
    return [
        replace(stream, split=explicit[stream.source] or (stream.split if trusts_names else None)) for stream in streams
    ]


def _open(source: SourceConfig, index: int, num_sources: int, follow_links: bool) -> Iterator[RowStream]:
    prefix = "" if num_sources == 1 else f"sources[{index}]/"
    location = resolve(source)
    if location.format == "builtin":
        from vlm.data.builtin import COLUMNS, NUM_ROWS, builtin_rows

        yield RowStream(
            index,
            f"{prefix}builtin",
            None,
            COLUMNS,
            None,
            builtin_rows,
            source.max_rows,
            NUM_ROWS,
            partial(cut_evenly, NUM_ROWS),
        )
    elif location.format == "hub":
        from vlm.data.hub import open_hub_dataset

        for split, columns, rows, cut in open_hub_dataset(source):
            label = f"{prefix}{source.path}/{split.name}"
            yield RowStream(
                index,
                label,
                split.split,
                columns,
                ImageFolder.of_hub(source.path),
                rows,
                source.max_rows,
                split.num_rows,
                cut,
            )
    else:
        for file in location.files:
            stream = _file_stream(source, index, location, file, prefix)
            folder = stream.folder
            assert folder is not None
            yield replace(stream, folder=replace(folder, follow_links=follow_links))


def _file_stream(source: SourceConfig, index: int, location: Location, file: DataFile, prefix: str) -> RowStream:
    from vlm.data import readers

    columns = readers.columns_of(location.fs, file.path, file.format)
    if not columns:
        raise DataError(
            f"{file.path!r} has no columns: it is empty or not {file.format}. Remove it from data.sources, or set the source's format."
        )
    twice = (
        next((name for name in columns if columns.count(name) > 1), None) if len(set(columns)) < len(columns) else None
    )
    if twice is not None:
        raise DataError(
            f"{file.path!r} has two columns named {twice!r}, of which one would be lost; rename one of them."
        )
    rows: Callable[..., Iterator[Any]] = partial(readers.read_rows, location.fs, file.path, file.format)
    cut = partial(readers.cut_rows, location.fs, file.path, file.format)
    if location.format == "imagefolder":
        renamed = {name: _image_column(name) for name in columns}
        if not any(name != new for name, new in renamed.items()):
            raise DataError(
                f"{file.path!r} has no column 'file_name' or 'file_names' that names its images. Its columns: {', '.join(columns)}."
            )
        rows = partial(_rename, rows, renamed)
        columns = list(renamed.values())
    root = location.root if location.is_folder else posixpath.dirname(file.path)
    folder = ImageFolder(location.fs, posixpath.dirname(file.path), root)
    local_file = file.path if is_local(location.fs) else None
    return RowStream(
        index, prefix + file.name, file.split, tuple(columns), folder, rows, source.max_rows, None, cut, local_file
    )


def _image_column(name: str) -> str:
    """`datasets` writes images as 'file_name(s)', and images of column x as 'x_file_name(s)'."""
    if name in ("file_name", "file_names"):
        return "image" if name == "file_name" else "images"
    return name.removesuffix("_file_name").removesuffix("_file_names")


def _rename(
    rows: Callable[..., Iterator[Row | UnreadableRow]], names: dict[str, str], part: RowRange = WHOLE
) -> Iterator[Row | UnreadableRow]:
    for row in rows(part):
        yield {names.get(name, name): value for name, value in row.items()} if isinstance(row, dict) else row
