"""Ranges of rows that can be read without those before them. Light imports only."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class RowRange:
    """Some rows of a stream that follow each other.

    Attributes:
        at: Where reading starts: a row group (parquet), a batch (Arrow), a byte of the text, decompressed (JSON lines, CSV), a
            row (built-in), a file (Hub).
        skip: Rows to pass over from there.
        num_rows: How many to take; None for all that are there.
        line: Lines of the file before `at` (CSV).
    """

    at: int = 0
    skip: int = 0
    num_rows: int | None = None
    line: int = 0

    def of(self, rows: Iterable[T]) -> Iterator[T]:
        """The first rows, as many as it takes.

        Args:
            rows: From the first one that it takes.
        """
        return itertools.islice(rows, self.num_rows)


WHOLE = RowRange()


@dataclass
class PartSize:
    """How much one range should hold, at most. May change while ranges are cut.

    Attributes:
        max_rows: Rows.
        max_bytes: Bytes of the source, uncompressed.
        max_pieces: Into how many pieces a row group is cut: each is read from the group's beginning.
    """

    max_rows: int
    max_bytes: int
    max_pieces: int = 8


def cut_evenly(num_rows: int, size: PartSize, counted: bool = True) -> Iterator[RowRange]:
    """Cuts rows that can be had one by one.

    Args:
        num_rows: How many there are.
        size: Of a range.
        counted: Asks for ranges with a number of rows, which these have.
    """
    start = 0
    while start < num_rows:
        count = min(size.max_rows, num_rows - start)
        yield RowRange(at=start, num_rows=count)
        start += count


def cut_units(units: Iterable[tuple[int, int]], size: PartSize) -> Iterator[RowRange]:
    """Cuts a file that consists of units, such as row groups: small ones stay together, large ones are divided.

    Args:
        units: Rows and bytes of each.
        size: Of a range.
    """
    first = rows = size_bytes = 0
    for number, (unit_rows, unit_bytes) in enumerate(units):
        if unit_rows <= 0:
            continue
        if rows and (rows + unit_rows > size.max_rows or size_bytes + unit_bytes > size.max_bytes):
            yield RowRange(at=first, num_rows=rows)
            rows = size_bytes = 0
        if not rows:
            first = number
        if unit_rows > size.max_rows or unit_bytes > size.max_bytes:  # so it is the first one
            yield from _pieces(number, unit_rows, unit_bytes, size)
            continue
        rows += unit_rows
        size_bytes += unit_bytes
    if rows:
        yield RowRange(at=first, num_rows=rows)


def _pieces(number: int, num_rows: int, size_bytes: int, size: PartSize) -> Iterator[RowRange]:
    done = 0
    while done < num_rows:
        by_bytes = num_rows * size.max_bytes // max(1, size_bytes)
        fewest = -(-num_rows // size.max_pieces)
        count = min(num_rows - done, max(1, min(size.max_rows, by_bytes), fewest))
        yield RowRange(at=number, skip=done, num_rows=count)
        done += count


class Cutter:
    """Cuts a text whose rows are met one after the other.

    Args:
        at: Byte at which the first row starts.
        size: Of a range.
        line: Lines before that.
    """

    def __init__(self, at: int, size: PartSize, line: int = 0) -> None:
        self._start = at
        self._line = line
        self._size = size
        self._rows = 0

    def row(self, end: int, line: int = 0) -> Iterator[RowRange]:
        """Counts a row; gives a range if it is full.

        Args:
            end: Byte behind the row.
            line: Lines up to there.
        """
        self._rows += 1
        if self._rows >= self._size.max_rows or end - self._start >= self._size.max_bytes:
            yield from self.rest()
            self._start, self._line = end, line

    def rest(self) -> Iterator[RowRange]:
        """Gives the rows counted since the last range, if there are any."""
        if self._rows:
            yield RowRange(at=self._start, num_rows=self._rows, line=self._line)
        self._rows = 0
