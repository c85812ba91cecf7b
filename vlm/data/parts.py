"""Prepares a dataset in parts, by workers in several processes or on several hosts, and joins them in order.

streams -> cut into parts -> [workers: read, map, decode, measure, resize] -> joined: names, splits, ledger -> storage

Which worker does what, and how parts are cut, changes nothing: the one who joins takes row after row, as `vlm.data.prepare` does,
with the same `Sink`. Nothing of a part is in memory as a whole; parts are files in a folder that all of them reach.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from vlm import progress
from vlm.config.data import DataConfig
from vlm.data.exchange import Exchange, ExchangeOwner, OpenProcessing
from vlm.data.images import ImageFolder
from vlm.data.mapping import Columns, resolve_columns
from vlm.data.part_files import PartWriter, read_part
from vlm.data.process_settings import preparing
from vlm.data.ranges import WHOLE, PartSize, RowRange
from vlm.data.rows import RowError
from vlm.data.sample import Job, SampleMaker
from vlm.data.sink import DatasetSummary, FinishedRow, Sink, finish, open_sink
from vlm.data.sources import RowQuota, RowStream, num_rows_known, open_streams
from vlm.data.threads import in_order
from vlm.errors import DataError, ResourceError

# Long enough for what a part costs besides its rows, short enough for bars, disks and those who wait at the end.
_PART_SECONDS = 2.0
_PART_SOURCE_BYTES = 32 << 20
_PART_FILE_BYTES = 64 << 20
_FIRST_ROWS = 64
_MOST_ROWS = 1 << 16


@dataclass(frozen=True)
class Part:
    """What one worker is told: everything that it needs, and no rows.

    Attributes:
        number: In order.
        stream_number: Index of its stream.
        stream: Where the rows are.
        rows: Which of them.
        columns: What they hold.
        data: Settings of the dataset.
        exchange: Address of the folder for its result.
        num_threads: As `num_workers` of `vlm.data.prepare.prepare_dataset`.
        seen: Size and time of the stream's file, as seen by who cut the part; None if it is not on this machine.
    """

    number: int
    stream_number: int
    stream: RowStream
    rows: RowRange
    columns: Columns
    data: DataConfig
    exchange: str
    num_threads: int
    seen: tuple[int, int] | None


@dataclass(frozen=True)
class PartResult:
    """What became of a part.

    Attributes:
        file: Its file in the exchange folder.
        num_rows: Rows in it.
        size_bytes: Of the file, roughly.
        wall_seconds: Time it took, without opening the processor.
        limit_tokens: Longest conversation that was let in; None means any.
    """

    file: str
    num_rows: int
    size_bytes: int
    wall_seconds: float
    limit_tokens: int | None


# Has workers prepare parts and gives the results in the order of the parts. It asks for parts as it needs them.
RunParts = Callable[[Iterator[Part]], Iterator[PartResult]]


def prepare_part(part: Part, open_processing: OpenProcessing) -> PartResult:
    """Prepares a part; safe to call from several threads at once. What a worker does.

    Args:
        part: The part.
        open_processing: Opens a model's processor from a folder.

    Raises:
        DataError: The stream cannot be read.
        ResourceError: This host does not see the exchange folder, or another file where the stream's should be.
        StoppedError: Nobody waits for the part any more.
    """
    exchange = Exchange(part.exchange)
    maker = SampleMaker(part.data, exchange.processing(open_processing))
    started = time.monotonic()
    _check_seen(part)
    stream = part.stream
    # A worker that was given up for dead may still be at the same part.
    name = f"part-{part.number:06d}-{uuid.uuid4().hex}.arrow"
    size_bytes = 0
    with (
        preparing(part.data.max_source_pixels),
        exchange.writing(name) as handle,
        PartWriter(handle) as writer,
    ):
        rows = stream.rows(part.rows) if stream.cut is not None else part.rows.of(stream.rows())
        jobs = (Job(part.stream_number, number, row, part.columns, stream.folder) for number, row in enumerate(rows))
        for _, outcome in in_order(jobs, maker, part.num_threads):
            exchange.look()
            row = FinishedRow.of(outcome)
            writer.add(row)
            size_bytes += 0 if row.record is None else row.record.size_bytes
    return PartResult(name, writer.num_rows, size_bytes, time.monotonic() - started, maker.limit_tokens)


def prepare_in_parts(
    data: DataConfig,
    processor_dir: Path,
    output_dir: Path,
    run_parts: RunParts,
    *,
    exchange: str,
    scratch: Path,
    num_threads: int = 0,
    max_pieces: int = 8,
    required_splits: tuple[str, ...] = ("train",),
) -> DatasetSummary:
    """Writes the dataset of a configuration, to the same bytes as `vlm.data.prepare.prepare_dataset`.

    Args:
        data: Sources, columns, splits and limits.
        processor_dir: The model's processor.
        output_dir: Empty folder to write into.
        run_parts: Has workers call `prepare_part`.
        exchange: Address of a folder that all workers reach. When this returns or raises, they stop; the caller removes it.
        scratch: Empty local folder for files on the way.
        num_threads: Of each worker, for rows that are worth handing over; 0 works in the calling one.
        max_pieces: Into how many pieces a row group of parquet is cut at most.
        required_splits: Splits that must not be empty.

    Returns:
        Counts; the same as in ``summary.json``.

    Raises:
        DataError: As `vlm.data.prepare.prepare_dataset`; or a source changed meanwhile.
        ResourceError: A host does not see what it should.
    """
    streams = open_streams(data.sources, follow_links=data.follow_links)
    plan = _Plan(streams, data, exchange, num_threads, max_pieces)
    limit_tokens = None
    bar = progress.bar("prepare", num_rows_known(streams))
    with ExitStack() as stack:
        stack.callback(bar.close)
        sink = stack.enter_context(open_sink(data, streams, output_dir))
        owner = stack.enter_context(ExchangeOwner(exchange, processor_dir, scratch))
        for result in run_parts(plan.parts()):
            plan.learn(result)
            limit_tokens = result.limit_tokens
            with owner.reading(result.file) as path:
                bar.update(plan.join_next(result, path, sink))
        if plan.error is not None:
            raise plan.error
        summary = sink.summary(limit_tokens)
    finish(sink, summary, output_dir, required_splits)
    return summary


class _Plan:
    """Cuts parts while earlier ones are prepared, about as long as those took; and joins them.

    Attributes:
        error: What came up while cutting: it is raised when the rows before it were taken.
    """

    def __init__(
        self, streams: list[RowStream], data: DataConfig, exchange: str, num_threads: int, max_pieces: int
    ) -> None:
        self._streams = streams
        self._columns = [resolve_columns(data.columns, stream) for stream in streams]
        self._data = data
        self._exchange = exchange
        self._num_threads = num_threads
        self._size = PartSize(_FIRST_ROWS, _PART_SOURCE_BYTES, max_pieces)
        self._planned, self._joined = RowQuota(), RowQuota()
        self._num_joined = [0] * len(streams)
        self._given: deque[Part] = deque()
        self.error: DataError | None = None

    def parts(self) -> Iterator[Part]:
        """All parts in order."""
        number = 0
        try:
            for stream_number, stream in enumerate(self._streams):
                seen = None if stream.local_file is None else _size_and_time(stream.local_file)
                for rows in self._ranges(stream):
                    part = Part(
                        number,
                        stream_number,
                        stream,
                        rows,
                        self._columns[stream_number],
                        self._data,
                        self._exchange,
                        self._num_threads,
                        seen,
                    )
                    self._given.append(part)
                    yield part
                    number += 1
        except DataError as error:
            self.error = error

    def _ranges(self, stream: RowStream) -> Iterator[RowRange]:
        limited = stream.max_rows is not None
        if self._planned.left(stream) == 0:
            return
        for rows in [WHOLE] if stream.cut is None else stream.cut(self._size, limited):
            left = self._planned.left(stream)
            # What is not known to be there is not counted: rows over the limit are left when parts are joined.
            num_known = 0 if rows.num_rows is None else rows.num_rows
            if left is not None and (rows.num_rows is None or rows.num_rows > left):
                rows, num_known = replace(rows, num_rows=left), min(num_known, left)
            yield rows
            self._planned.take(stream, num_known)
            if self._planned.left(stream) == 0:
                return

    def learn(self, result: PartResult) -> None:
        """Makes the next parts larger or smaller, by what one took."""
        if result.num_rows == 0:
            return
        by_time = result.num_rows * _PART_SECONDS / max(1e-3, result.wall_seconds)
        by_bytes = result.num_rows * _PART_FILE_BYTES / max(1, result.size_bytes)
        # Step by step: rows differ.
        wanted = min(max(by_time, self._size.max_rows / 2), self._size.max_rows * 4)
        self._size.max_rows = int(min(max(1, min(wanted, by_bytes)), _MOST_ROWS))

    def join_next(self, result: PartResult, path: Path, sink: Sink) -> int:
        """Takes the rows of the first part that was given and not joined yet.

        Returns:
            How many.
        """
        part = self._given.popleft()
        number, stream, expected = part.stream_number, part.stream, part.rows.num_rows
        if expected is not None and stream.cut is not None and result.num_rows != expected:
            raise DataError(f"{stream.label!r} has changed while it was read; run again when it is complete")
        taken = 0
        for row in read_part(path):
            if self._joined.left(stream) == 0:
                break
            _check_absent(row, stream.folder)
            sink.take(number, self._num_joined[number], row)
            self._num_joined[number] += 1
            self._joined.take(stream, 1)
            taken += 1
        return taken


def _check_seen(part: Part) -> None:
    """Compares the file that this host sees with the one that the part was cut from."""
    path = part.stream.local_file
    if path is None or part.seen is None:
        return
    try:
        same = _size_and_time(path) == part.seen
        problem = "sees another file than the one that started the preparation (other size or time)"
    except OSError:
        same, problem = False, "does not see it"
    if not same:
        raise ResourceError(
            f"data source {path!r}: the host {socket.gethostname()!r} {problem}; give data.sources an address that all hosts"
            " reach (a shared file system, s3://…), and change no file meanwhile"
        )


def _size_and_time(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _check_absent(row: FinishedRow, folder: ImageFolder | None) -> None:
    """A row whose image is not there for a worker, but is for us, must not be dropped: that host lacks a mount."""
    if row.record is not None or folder is None or folder.fs is None:
        return
    for note in row.notes:
        path = note.details.get("path")
        if note.reason != "image_not_found" or not isinstance(path, str):
            continue
        try:
            there = folder.fs.isfile(folder.locate(path))
        except (RowError, OSError, ValueError):
            continue
        if there:
            raise ResourceError(
                f"a host that prepares rows does not see the image {path!r}; give data.sources an address whose images all hosts"
                " reach (a shared file system, s3://…)"
            )
