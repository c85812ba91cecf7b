"""Putting rows into packs: few packs, none over its limits, all about equally costly. numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

Sizes = npt.NDArray[np.float64]

# Rows among which the last few of a pack are chosen. More would fill no better and disturb the order more.
_WINDOW = 128
# A pack is filled in order up to this many mean rows below its limit, then by choice.
_CHOSEN_ROWS = 6


def first_fit_decreasing(sizes: Sizes, limits: Sizes) -> list[list[int]]:
    """Packs as few bins as first-fit decreasing gives (at most 11/9 of the fewest; Dósa 2007).

    Args:
        sizes: Array of shape [items, measures]: what each item takes, for instance tokens and bytes.
        limits: Array of shape [measures]: what a bin holds. An item over a limit gets a bin of its own.

    Returns:
        Item numbers of each bin.
    """
    order = np.argsort(-(sizes / limits).max(1), kind="stable")
    loads = np.zeros((0, sizes.shape[1]))
    bins: list[list[int]] = []
    for item in order.tolist():
        fitting = np.flatnonzero((loads + sizes[item] <= limits).all(1))
        if len(fitting):
            loads[fitting[0]] += sizes[item]
            bins[fitting[0]].append(item)
        else:
            loads = np.concatenate([loads, sizes[item : item + 1]])
            bins.append([item])
    return bins


def balanced(sizes: Sizes, limits: Sizes, bins: list[list[int]]) -> list[list[int]]:
    """The same items in as many bins, none of which is much fuller than the others.

    Each item, the largest first, goes to the bin that is emptiest by its fullest measure (Graham 1969). Where that breaks
    a limit or gains nothing, the bins stay as they are.

    Args:
        sizes: Array of shape [items, measures].
        limits: Array of shape [measures].
        bins: Item numbers of each bin.

    Returns:
        Item numbers of each bin, the costliest bin first.
    """
    totals = sizes.sum(0)
    shares = sizes / np.where(totals > 0, totals, 1)
    loads = np.zeros((len(bins), sizes.shape[1]))
    spread: list[list[int]] = [[] for _ in bins]
    for item in np.argsort(-shares.max(1), kind="stable").tolist():
        emptiest = int(np.argmin((loads + shares[item]).max(1)))
        loads[emptiest] += shares[item]
        spread[emptiest].append(item)

    def fullest(candidate: list[list[int]]) -> float:
        return float(max(shares[items].sum(0).max() for items in candidate))

    fits = all((sizes[items].sum(0) <= limits).all() for items in spread if len(items) > 1)
    if all(spread) and fits and fullest(spread) < fullest(bins):
        bins = spread
    return sorted(bins, key=lambda items: -float(shares[items].sum(0).max()))


def filled(lengths: npt.NDArray[np.int64], stream: Iterable[int], capacity: int) -> Iterator[list[int]]:
    """Fills packs from a stream of rows, each as full as a choice among the next rows allows.

    Rows are taken in order until a pack is nearly full; what remains is filled exactly, or as nearly as some of the next
    rows can. A row that was passed over heads the queue for the next pack, so that none waits long.

    Args:
        lengths: Array of shape [rows]: tokens of each row, none over the capacity.
        stream: Row numbers, repetitions allowed.
        capacity: Most tokens of a pack.

    Yields:
        Row numbers of each pack.
    """
    rows = iter(stream)
    queue: list[int] = []
    reserve = _CHOSEN_ROWS * float(lengths.mean())

    def refill(count: int) -> None:
        while len(queue) < count:
            row = next(rows, None)
            if row is None:
                return
            queue.append(int(row))

    refill(1)
    while queue:
        pack: list[int] = []
        space = capacity
        while True:
            refill(1)
            # The first row is taken in any case.
            if not queue or lengths[queue[0]] > space or (pack and space <= reserve):
                break
            pack.append(queue.pop(0))
            space -= int(lengths[pack[-1]])
        refill(_WINDOW)
        chosen = best_subset([int(lengths[row]) for row in queue[:_WINDOW]], space)
        pack += [queue[place] for place in chosen]
        for place in reversed(chosen):
            del queue[place]
        yield pack
        refill(1)


def best_subset(sizes: Sequence[int], space: int) -> list[int]:
    """Which items fill a space best, by dynamic programming over all sums; the first ones where there is a choice.

    Args:
        sizes: Of the items, whole and positive.
        space: What they may fill together.

    Returns:
        Their places, in order.
    """
    # Bit s of sums[i] tells whether some of the items from i on make s.
    within = (1 << (space + 1)) - 1
    sums = [1]
    for size in reversed(sizes):
        sums.append((sums[-1] | sums[-1] << size) & within)
    sums.reverse()
    remaining = sums[0].bit_length() - 1
    chosen = []
    for place, size in enumerate(sizes):
        if size <= remaining and sums[place + 1] >> (remaining - size) & 1:
            chosen.append(place)
            remaining -= size
    return chosen
