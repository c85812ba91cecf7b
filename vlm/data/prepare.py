"""Prepares a dataset: streams rows, works on a bounded number of them at a time, and writes them in order.

sources -> rows -> [map, decode, measure, resize: threads] -> names, splits -> storage
└── what is wrong with a row ──────────> ledger

`vlm.data.parts` does the same with several processes or hosts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from vlm import progress
from vlm.config.data import DataConfig
from vlm.data.mapping import resolve_columns
from vlm.data.process_settings import preparing
from vlm.data.sample import ConversationEncoder, Job, SampleMaker
from vlm.data.sink import DatasetSummary, FinishedRow, finish, open_sink
from vlm.data.sources import RowQuota, RowStream, num_rows_known, open_streams
from vlm.data.threads import in_order


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
        stack.enter_context(preparing(data.max_source_pixels))
        sink = stack.enter_context(open_sink(data, streams, output_dir))
        maker = SampleMaker(data, processing)
        count = os.cpu_count() or 1 if num_workers is None else num_workers
        outcomes = in_order(_jobs(streams, data), maker, count)
        for job, outcome in progress.track(outcomes, "prepare", num_rows_known(streams)):
            sink.take(job.stream, job.row_number, FinishedRow.of(outcome))
        summary = sink.summary(maker.limit_tokens)
    finish(sink, summary, output_dir, required_splits)
    return summary


def _jobs(streams: list[RowStream], data: DataConfig) -> Iterator[Job]:
    # All columns are checked before the first row of any stream is read.
    columns = [resolve_columns(data.columns, stream) for stream in streams]
    quota = RowQuota()
    for number, stream in enumerate(streams):
        if quota.left(stream) == 0:
            continue
        for row_number, row in enumerate(stream.rows()):
            yield Job(number, row_number, row, columns[number], stream.folder)
            quota.take(stream, 1)
            if quota.left(stream) == 0:
                break
