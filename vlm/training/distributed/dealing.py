"""Which process computes which part of a step. numpy only.

The plan says which rows make up a step and cuts them into as few micro-batches as memory allows, for one process. Here a step is
cut anew for several: into as many micro-batches as make the same number for each, about equally costly. The loss of a
step is a sum over its tokens divided by their number, so how it is cut changes nothing but the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlm.packing.bins import balanced, first_fit_decreasing

Rows = list[int]


def dealt_packs(
    packs: Sequence[Sequence[int]], lengths: npt.NDArray[np.int64], visual: npt.NDArray[np.int64], num_processes: int
) -> list[list[Rows]]:
    """A step's packs for each process, none larger than the step's largest.

    Rows are spread so that neither language nor vision work piles up. Where no such spread stays within the limits, the
    plan's packs are dealt as they are.

    Args:
        packs: Row numbers of each pack of the step.
        lengths: Array of shape [rows]: tokens of each row.
        visual: Array of shape [rows]: visual tokens of each row.
        num_processes: How many take part.

    Returns:
        For each process, row numbers of its packs; none where there are fewer rows than processes.
    """
    rows = np.concatenate([np.asarray(pack, dtype=np.int64) for pack in packs])
    sizes = np.stack([lengths[rows], visual[rows]], 1).astype(np.float64)
    number = min(len(rows), num_processes * math.ceil(len(packs) / num_processes))
    # Memory is linear in both counts, so what exceeds no pack of the plan in either fits as well as that pack.
    limits = np.array([[lengths[list(pack)].sum(), visual[list(pack)].sum()] for pack in packs]).max(0)
    limits = np.maximum(limits, 1).astype(np.float64)
    bins = balanced(sizes, limits, [items for items in _spread(sizes, number) if items])
    if any((sizes[items].sum(0) > limits).any() for items in bins if len(items) > 1):
        bins = first_fit_decreasing(sizes, limits)
        if len(bins) > number:
            return _dealt([list(pack) for pack in packs], lengths, visual, num_processes)
    return _dealt([sorted(rows[items].tolist()) for items in bins], lengths, visual, num_processes)


def dealt_batches(
    batches: Sequence[Sequence[int]], lengths: npt.NDArray[np.int64], visual: npt.NDArray[np.int64], num_processes: int
) -> list[list[Rows]]:
    """A step's padded batches for each process: neighbours by length stay together, which keeps padding low.

    Args:
        batches: Row numbers of each batch of the step.
        lengths: Array of shape [rows]: tokens of each row.
        visual: Array of shape [rows]: visual tokens of each row.
        num_processes: How many take part.

    Returns:
        For each process, row numbers of its batches, none of which has more rows than the step's largest.
    """
    rows = np.concatenate([np.asarray(batch, dtype=np.int64) for batch in batches])
    ordered = rows[np.lexsort((rows, -lengths[rows]))]
    number = min(len(rows), num_processes * math.ceil(len(batches) / num_processes))
    parts = [part.tolist() for part in np.array_split(ordered, number)]
    return _dealt(parts, lengths, visual, num_processes)


def shares(batches: Sequence[Sequence[int]], lengths: npt.NDArray[np.int64], num_processes: int) -> list[list[int]]:
    """Which of some batches each process takes, about equally many tokens each.

    Args:
        batches: Row numbers of each batch.
        lengths: Array of shape [rows]: tokens of each row.
        num_processes: How many take part.

    Returns:
        For each process, rising places among the batches.
    """
    loads = [0] * num_processes
    taken: list[list[int]] = [[] for _ in loads]
    sizes = [int(lengths[list(batch)].sum()) for batch in batches]
    for place in sorted(range(len(batches)), key=lambda place: -sizes[place]):
        process = loads.index(min(loads))
        loads[process] += sizes[place]
        taken[process].append(place)
    return [sorted(places) for places in taken]


def _spread(sizes: npt.NDArray[np.float64], number: int) -> list[list[int]]:
    """Items dealt in turn, the largest first: a start that `balanced` improves on."""
    order = np.argsort(-(sizes / np.maximum(sizes.sum(0), 1)).max(1), kind="stable").tolist()
    return [order[first::number] for first in range(number)]


def _dealt(
    parts: list[Rows], lengths: npt.NDArray[np.int64], visual: npt.NDArray[np.int64], num_processes: int
) -> list[list[Rows]]:
    """Parts to processes: as equally many as can be, the costliest to whoever has least by its fuller measure (Graham 1969)."""
    costs = np.array([[lengths[part].sum(), visual[part].sum()] for part in parts], dtype=np.float64)
    costs /= np.maximum(costs.sum(0), 1)
    loads = np.zeros((num_processes, 2))
    dealt: list[list[Rows]] = [[] for _ in range(num_processes)]
    most = math.ceil(len(parts) / num_processes)
    for place in np.argsort(-costs.max(1), kind="stable").tolist():
        open_ones = [process for process in range(num_processes) if len(dealt[process]) < most]
        process = min(open_ones, key=lambda process: (float((loads[process] + costs[place]).max()), process))
        loads[process] += costs[place]
        dealt[process].append(parts[place])
    return dealt
