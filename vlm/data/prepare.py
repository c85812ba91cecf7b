"""Prepares a dataset: streams rows, works on a bounded number of them at a time, and writes them in order.

sources -> rows -> [map, decode, measure, resize: threads] -> split -> storage
└── what is wrong with a row ──────────> ledger
"""

from __future__ import annotations

import gc
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vlm import progress
from vlm.config.data import DataConfig
from vlm.data.images import pillow_limit, pillow_quiet
from vlm.data.ledger import Ledger
from vlm.data.mapping import resolve_columns
from vlm.data.rows import Outcome, Sample
from vlm.data.sample import ConversationEncoder, Job, SampleMaker
from vlm.data.sources import RowStream, open_streams
from vlm.data.splits import SPLITS, LeakWatch, UniqueNames, split_of
from vlm.data.storage import SplitWriter
from vlm.errors import DataError
from vlm.summary import Summary

# A column that is mapped wrongly spoils every row; nobody should wait for the millionth to hear it.
_ALL_DROPPED_AFTER = 1000
_CHUNK_WEIGHT_BYTES = 1 << 18
_CHUNK_MAX_ROWS = 32
# Rows whose pixels take less are faster in one thread than in several: most of their time is spent under Python's lock.
_SMALL_ROW_BYTES = 1 << 15


@dataclass
class SplitSummary:
    """Totals of one split."""

    num_rows: int = 0
    num_images: int = 0
    num_tokens: int = 0
    num_visual_tokens: int = 0
    num_supervised_tokens: int = 0
    longest_tokens: int = 0
    longest_id: str | None = None

    def add(self, row_id: str, sample: Sample) -> None:
        """Counts one more row."""
        num_tokens = len(sample.input_ids)
        self.num_rows += 1
        self.num_images += len(sample.images)
        self.num_tokens += num_tokens
        self.num_visual_tokens += sample.num_visual_tokens
        self.num_supervised_tokens += sample.num_supervised_tokens
        if num_tokens > self.longest_tokens:
            self.longest_tokens, self.longest_id = num_tokens, row_id


@dataclass(frozen=True)
class DatasetSummary(Summary):
    """What preparation did; also written as ``summary.json``.

    Attributes:
        num_rows_in: Rows read. Equal to the rows of all splits and the dropped ones together.
        num_rows: Rows written, by split.
        num_dropped: Rows dropped, each with a ledger entry.
        ledger: Number of ledger entries as ``{action: {reason: count}}``.
        limit_tokens: Longest conversation that was let in; None means any.
        splits: Totals by split.
    """

    num_rows_in: int
    num_rows: dict[str, int]
    num_dropped: int
    ledger: dict[str, dict[str, int]]
    limit_tokens: int | None
    splits: dict[str, SplitSummary]


def prepare_dataset(
    data: DataConfig,
    processing: ConversationEncoder,
    output_dir: Path,
    *,
    num_workers: int | None = None,
    required_splits: tuple[str, ...] = ("train",),
) -> DatasetSummary:
    """Writes the dataset of a configuration; memory does not grow with the images, only by some 100 bytes per row for unique names.

    Args:
        data: Sources, columns, splits and limits.
        processing: Gives target sizes and exact tokens.
        output_dir: Empty folder to write into.
        num_workers: Threads for rows that are worth handing over; None takes one per core, 0 works in the calling thread.
        required_splits: Splits that must not be empty.

    Returns:
        Counts; the same as in ``summary.json``.

    Raises:
        DataError: If a source or column is missing, too many rows had to be dropped, or a required split is empty.
    """
    streams = open_streams(data.sources, follow_links=data.follow_links)
    output_dir = Path(output_dir)
    with ExitStack() as stack:
        stack.enter_context(pillow_limit(data.max_source_pixels))
        stack.enter_context(pillow_quiet())
        stack.enter_context(_old_objects_left_alone())
        ledger = stack.enter_context(Ledger(output_dir / "ledger.jsonl"))
        writers = {split: stack.enter_context(SplitWriter(output_dir / split)) for split in SPLITS}
        sink = _Sink(data, streams, ledger, writers)
        maker = SampleMaker(data, processing)
        jobs = _jobs(streams, data)
        totals = [stream.num_rows for stream in streams]
        total = None if None in totals else sum(filter(None, totals))
        count = os.cpu_count() or 1 if num_workers is None else num_workers
        for job, outcome in progress.track(_in_order(jobs, maker, count), "prepare", total):
            sink.take(job, outcome)
        summary = sink.summary(maker.limit_tokens)
    _check(data, summary, ledger, required_splits)
    text = json.dumps(summary.to_json(), sort_keys=True, indent=2, ensure_ascii=False)
    (output_dir / "summary.json").write_text(text + "\n", encoding="utf-8")
    return summary


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Spares the garbage collector what lived before: with torch loaded, one full pass costs as much as a thousand text lines."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _jobs(streams: list[RowStream], data: DataConfig) -> Iterator[Job]:
    # All columns are checked before the first row of any stream is read.
    columns = [resolve_columns(data.columns, stream) for stream in streams]
    taken: dict[tuple[int, str | None], int] = {}
    for number, stream in enumerate(streams):
        key = (stream.source, stream.split)
        if stream.max_rows is not None and taken.get(key, 0) >= stream.max_rows:
            continue
        for row_number, row in enumerate(stream.rows()):
            yield Job(number, row_number, row, columns[number], stream.folder)
            taken[key] = taken.get(key, 0) + 1
            if stream.max_rows is not None and taken[key] >= stream.max_rows:
                break


def _in_order(jobs: Iterator[Job], maker: SampleMaker, num_workers: int) -> Iterator[tuple[Job, Outcome]]:
    """Outcomes in the order of the jobs; at most two chunks per worker, and two more, are in memory.

    Small rows that hold their images are prepared here as soon as those before them turned out to be small as well.
    """
    if num_workers == 0:
        for chunk in _chunks(jobs):
            yield from zip(chunk, maker(chunk), strict=True)
        return
    small = False
    window: deque[tuple[list[Job], Future[list[Outcome]]]] = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="prepare")
    try:
        for chunk in _chunks(jobs):
            future: Future[list[Outcome]]
            if small and len(chunk) > 1:
                future = Future()
                future.set_result(maker(chunk))
            else:
                future = pool.submit(maker, chunk)
            window.append((chunk, future))
            if len(window) >= 2 * num_workers + 2:
                done, future = window.popleft()
                outcomes = future.result()
                small = _are_small(outcomes)
                yield from zip(done, outcomes, strict=True)
        while window:
            done, future = window.popleft()
            yield from zip(done, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _are_small(outcomes: list[Outcome]) -> bool:
    sizes = [sum(image.nbytes for image in outcome.sample.images) for outcome in outcomes if outcome.sample is not None]
    return bool(sizes) and sum(sizes) <= _SMALL_ROW_BYTES * len(sizes)


def _chunks(jobs: Iterator[Job]) -> Iterator[list[Job]]:
    """Small rows are handed over several at a time, large ones singly."""
    chunk: list[Job] = []
    weight = 0
    for job in jobs:
        chunk.append(job)
        weight += _weight(job)
        if weight >= _CHUNK_WEIGHT_BYTES or len(chunk) >= _CHUNK_MAX_ROWS:
            yield chunk
            chunk, weight = [], 0
    if chunk:
        yield chunk


def _weight(job: Job) -> int:
    """Rough bytes of a row's images; what is not in the row itself counts as a large one."""
    weight = 0
    for name in job.columns.images if isinstance(job.row, dict) else ():
        value = job.row.get(name)  # type: ignore[union-attr]
        data = value.get("bytes") if isinstance(value, dict) else value
        weight += len(data) if isinstance(data, bytes) else _CHUNK_WEIGHT_BYTES if value else 0
    return weight


class _Sink:
    """Takes outcomes in order: names rows, chooses splits, writes samples and ledger entries."""

    def __init__(
        self, data: DataConfig, streams: list[RowStream], ledger: Ledger, writers: dict[str, SplitWriter]
    ) -> None:
        self._data = data
        self._streams = streams
        self._ledger = ledger
        self._writers = writers
        self._names = UniqueNames()
        self._leaks = LeakWatch()
        self._splits = {split: SplitSummary() for split in SPLITS}
        self.num_rows_in = 0

    def take(self, job: Job, outcome: Outcome) -> None:
        stream = self._streams[job.stream]
        self.num_rows_in += 1
        write = partial(self._ledger.add, source=stream.label, row=job.row_number)
        if outcome.sample is None:
            assert outcome.error is not None
            error = outcome.error
            write("dropped", error.reason, error.message, row_id=outcome.id, details=error.details)
            if self.num_rows_in == _ALL_DROPPED_AFTER == self._ledger.num_dropped():
                raise DataError(
                    f"each of the first {_ALL_DROPPED_AFTER} rows had to be dropped: {self._ledger.describe_dropped()} {_REMEDY}"
                )
            return
        sample = outcome.sample
        own_name = sample.id if sample.id is not None else f"{stream.label}#{job.row_number}"
        own_name = own_name.encode("utf-8", "backslashreplace").decode()  # file names need not be UTF-8
        name = self._names.claim(own_name, f"{job.row_number}")
        if name != own_name:
            write(
                "warning",
                "duplicate_id",
                f"another row has this id; this one became {name!r}",
                row_id=own_name,
                details={},
            )
        for note in outcome.notes:
            write(note.action, note.reason, note.message, row_id=name, details=note.details)
        split = stream.split or split_of(sample.group if sample.group is not None else name, self._data.split)
        if sample.group is not None:
            others = self._leaks.other_splits(sample.group, split)
            if others:
                message = f"group {sample.group!r} is in {split} and also in {', '.join(others)}: results on held-out rows may flatter"
                write(
                    "warning",
                    "leak",
                    message,
                    row_id=name,
                    details={"group": sample.group, "splits": [*others, split]},
                )
        self._writers[split].add(name, sample)
        self._splits[split].add(name, sample)

    def summary(self, limit_tokens: int | None) -> DatasetSummary:
        num_rows = {split: writer.num_rows for split, writer in self._writers.items()}
        num_dropped = self._ledger.num_dropped()
        assert self.num_rows_in == sum(num_rows.values()) + num_dropped, "a row was lost without a ledger entry"
        return DatasetSummary(
            num_rows_in=self.num_rows_in,
            num_rows=num_rows,
            num_dropped=num_dropped,
            ledger=self._ledger.by_action(),
            limit_tokens=limit_tokens,
            splits=self._splits,
        )


_REMEDY = "Mend the rows or data.columns, or raise data.max_dropped_fraction."


def _check(data: DataConfig, summary: DatasetSummary, ledger: Ledger, required_splits: tuple[str, ...]) -> None:
    if summary.num_rows_in == 0:
        raise DataError("the sources hold no row. Check data.sources.")
    if (
        summary.num_dropped > data.max_dropped_fraction * summary.num_rows_in
        or summary.num_dropped == summary.num_rows_in
    ):
        raise DataError(
            f"{summary.num_dropped} of {summary.num_rows_in} rows had to be dropped, over max_dropped_fraction {data.max_dropped_fraction}: "
            f"{ledger.describe_dropped()} {_REMEDY}"
        )
    for split in required_splits:
        if summary.num_rows[split] == 0:
            counts = ", ".join(f"{name} {count}" for name, count in summary.num_rows.items())
            raise DataError(
                f"the {split} split is empty (rows: {counts}). Give a source split: {split}, name files train/validation/test, "
                f"or change data.split.{'seed' if split == 'train' else f'{split}_fraction'}"
                + ("." if split == "train" else ", data.split.seed, or the split that generation.split names.")
            )
