"""Takes prepared rows in order: names them, chooses their splits, and writes samples and ledger entries.

However many threads, processes or hosts prepare rows, one of these makes the dataset of them; so its bytes are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from vlm.config.data import DataConfig
from vlm.data.ledger import Ledger
from vlm.data.rows import Note, Outcome
from vlm.data.sources import RowStream
from vlm.data.splits import SPLITS, LeakWatch, UniqueNames, split_of
from vlm.data.storage import Record, SplitWriter
from vlm.errors import DataError
from vlm.summary import Summary

# A column that is mapped wrongly spoils every row; nobody should wait for the millionth to hear it.
_ALL_DROPPED_AFTER = 1000


class FinishedRow(NamedTuple):
    """A row that needs nothing but its place in the dataset.

    Attributes:
        id: Its own name, or None.
        record: What is kept of it; None drops it.
        notes: What the ledger says of it; of a dropped row, why.
    """

    id: str | None
    record: Record | None
    notes: list[Note]

    @classmethod
    def of(cls, outcome: Outcome) -> FinishedRow:
        """The row that became of an outcome.

        Args:
            outcome: Of preparing it.
        """
        if outcome.sample is not None:
            return cls(outcome.sample.id, Record.of(outcome.sample), outcome.notes)
        assert outcome.error is not None
        error = outcome.error
        return cls(outcome.id, None, [Note("dropped", error.reason, error.message, error.details)])


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

    def add(self, row_id: str, record: Record) -> None:
        """Counts one more row."""
        num_tokens = len(record.input_ids)
        self.num_rows += 1
        self.num_images += len(record.pixels)
        self.num_tokens += num_tokens
        self.num_visual_tokens += record.num_visual_tokens
        self.num_supervised_tokens += record.num_supervised_tokens
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


class Sink:
    """Takes rows in order.

    Attributes:
        data: Settings of the dataset.
        ledger: What was said of rows.
        num_rows_in: Rows taken so far.
    """

    def __init__(
        self, data: DataConfig, streams: list[RowStream], ledger: Ledger, writers: dict[str, SplitWriter]
    ) -> None:
        self.data = data
        self._streams = streams
        self.ledger = ledger
        self._writers = writers
        self._names = UniqueNames()
        self._leaks = LeakWatch()
        self._splits = {split: SplitSummary() for split in SPLITS}
        self.num_rows_in = 0

    def take(self, stream_number: int, row_number: int, row: FinishedRow) -> None:
        """Takes the next row.

        Args:
            stream_number: Index of its stream.
            row_number: Its number there, from 0.
            row: The row.

        Raises:
            DataError: If it is the last of many, each of which had to be dropped.
        """
        stream = self._streams[stream_number]
        self.num_rows_in += 1
        write = partial(self.ledger.add, source=stream.label, row=row_number)
        record = row.record
        if record is None:
            for note in row.notes:
                write(note.action, note.reason, note.message, row_id=row.id, details=note.details)
            if self.num_rows_in == _ALL_DROPPED_AFTER == self.ledger.num_dropped():
                raise DataError(
                    f"each of the first {_ALL_DROPPED_AFTER} rows had to be dropped: {self.ledger.describe_dropped()} {_REMEDY}"
                )
            return
        own_name = row.id if row.id is not None else f"{stream.label}#{row_number}"
        own_name = own_name.encode("utf-8", "backslashreplace").decode()  # file names need not be UTF-8
        name = self._names.claim(own_name, f"{row_number}")
        if name != own_name:
            write(
                "warning",
                "duplicate_id",
                f"another row has this id; this one became {name!r}",
                row_id=own_name,
                details={},
            )
        for note in row.notes:
            write(note.action, note.reason, note.message, row_id=name, details=note.details)
        split = stream.split or split_of(record.group if record.group is not None else name, self.data.split)
        if record.group is not None:
            others = self._leaks.other_splits(record.group, split)
            if others:
                message = f"group {record.group!r} is in {split} and also in {', '.join(others)}: results on held-out rows may flatter"
                write(
                    "warning",
                    "leak",
                    message,
                    row_id=name,
                    details={"group": record.group, "splits": [*others, split]},
                )
        self._writers[split].add(name, record)
        self._splits[split].add(name, record)

    def summary(self, limit_tokens: int | None) -> DatasetSummary:
        """What was taken; all rows are there by then.

        Args:
            limit_tokens: Longest conversation that was let in.
        """
        num_rows = {split: writer.num_rows for split, writer in self._writers.items()}
        num_dropped = self.ledger.num_dropped()
        assert self.num_rows_in == sum(num_rows.values()) + num_dropped, "a row was lost without a ledger entry"
        return DatasetSummary(
            num_rows_in=self.num_rows_in,
            num_rows=num_rows,
            num_dropped=num_dropped,
            ledger=self.ledger.by_action(),
            limit_tokens=limit_tokens,
            splits=self._splits,
        )


@contextmanager
def open_sink(data: DataConfig, streams: list[RowStream], output_dir: Path) -> Iterator[Sink]:
    """A sink that writes into an empty folder; what it writes is whole once the block ends.

    Args:
        data: Splits and limits.
        streams: Where rows come from.
        output_dir: The folder.
    """
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger(output_dir / "ledger.jsonl"))
        writers = {split: stack.enter_context(SplitWriter(output_dir / split)) for split in SPLITS}
        yield Sink(data, streams, ledger, writers)


def finish(sink: Sink, summary: DatasetSummary, output_dir: Path, required_splits: tuple[str, ...]) -> None:
    """Checks what came out, and writes ``summary.json``, once the sink is closed.

    Args:
        sink: That took all rows.
        summary: Of the sink.
        output_dir: Its folder.
        required_splits: Splits that must not be empty.

    Raises:
        DataError: If there is no row, too many had to be dropped, or a required split is empty.
    """
    _check(sink.data, summary, sink.ledger, required_splits)
    text = json.dumps(summary.to_json(), sort_keys=True, indent=2, ensure_ascii=False)
    (output_dir / "summary.json").write_text(text + "\n", encoding="utf-8")


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
