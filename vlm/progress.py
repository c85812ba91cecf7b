"""Progress bars on long work, silent where nobody looks (no terminal)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Bar(Protocol):
    """What the core needs of a progress bar."""

    def update(self, n: float = 1) -> object:
        """Advances by ``n`` units."""

    def close(self) -> None:
        """Removes the bar."""


def bar(description: str, total: float | None, unit: str = "row") -> Bar:
    """Opens a bar on standard error that vanishes when closed.

    Args:
        description: What is being done, in a word or two.
        total: Number of units, or None when unknown.
        unit: Name of one unit; ``"B"`` shows binary multiples.
    """
    from tqdm import tqdm

    return tqdm(
        desc=description,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        unit_divisor=1024 if unit == "B" else 1000,
        leave=False,
        disable=None,
    )


@contextmanager
def counting_bytes(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Shows a bar for the length of a block; yields the function that advances it by a number of bytes.

    Args:
        description: What is being done, in a word or two.
        total: Number of bytes, or None when unknown.
    """
    progress = bar(description, total, "B")

    def advance(size_bytes: int) -> None:
        progress.update(size_bytes)

    try:
        yield advance
    finally:
        progress.close()


def track(items: Iterable[T], description: str, total: float | None = None, unit: str = "row") -> Iterator[T]:
    """Yields the items while a bar counts them."""
    progress = bar(description, total, unit)
    try:
        for item in items:
            yield item
            progress.update(1)
    finally:
        progress.close()
