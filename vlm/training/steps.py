"""Which rows make up a step, and how a step is cut into micro-batches: packs, or padded batches.

Rows are drawn epoch by epoch without replacement into one stream. A step takes the next ``batch_size ·
gradient_accumulation`` rows of it, or, with ``tokens_per_step``, rows until its packs are full. The loss of a step is a
mean over its tokens, so how it is cut changes speed and memory only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlm.config import TrainingConfig
from vlm.config.training import EPOCHS
from vlm.errors import ConfigError
from vlm.packing.bins import balanced, filled, first_fit_decreasing

Rows = npt.NDArray[np.int64]
# Shares above the even one that a pack may take so that the last pack of a training is as full as the others.
_LEVELS = (1.001, 1.003, 1.01, 1.02)


@dataclass(frozen=True)
class PackLimits:
    """What one pack may hold.

    Attributes:
        tokens: Most tokens; None where memory alone counts.
        cost: Bytes of each row at each of the peaks of a pass, an array of shape [rows, peaks].
        budget: Most bytes at any of them; infinite on a CPU.
    """

    tokens: int | None
    cost: npt.NDArray[np.float64]
    budget: float


def row_stream(num_rows: int, seed: int) -> Iterator[int]:
    """Row numbers, shuffled anew for every epoch, without end."""
    for epoch in itertools.count():
        yield from np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()


def num_rows_seen(num_rows: int, training: TrainingConfig) -> int:
    """Rows over the whole training where its length is given in epochs, repetitions counted."""
    return max(1, round((training.epochs or EPOCHS) * num_rows))


def rows_of_steps(num_rows: int, training: TrainingConfig) -> Iterator[tuple[int, Rows]]:
    """The rows of each step where a step is a number of conversations.

    Args:
        num_rows: In the training split.
        training: Length, batch size and seed.

    Yields:
        Pairs of the step, from 0, and its row numbers.
    """
    per_step = training.batch_size * training.gradient_accumulation
    total = num_rows_seen(num_rows, training) if training.max_steps is None else training.max_steps * per_step
    stream = np.fromiter(row_stream(num_rows, training.seed), np.int64, total)
    for step, start in enumerate(range(0, total, per_step)):
        yield step, stream[start : start + per_step]


def plan_batches(lengths: Rows, training: TrainingConfig) -> Iterator[tuple[int, Rows]]:
    """Padded micro-batches: within a step, rows are sorted by length before they are cut.

    The longest rows come first, so that what does not fit fails early.

    Args:
        lengths: Array of shape [rows]: tokens of each row.
        training: Length, batch size and seed.

    Yields:
        Pairs of the step, from 0, and an array of at most `batch_size` row numbers.
    """
    for step, rows in rows_of_steps(len(lengths), training):
        ordered = rows[np.lexsort((rows, -lengths[rows]))]
        for first in range(0, len(ordered), training.batch_size):
            yield step, ordered[first : first + training.batch_size]


def plan_packs(lengths: Rows, visual: Rows, training: TrainingConfig, limits: PackLimits) -> Iterator[tuple[int, Rows]]:
    """Packs of a number of conversations per step: as few per step as fit, about equally costly.

    Args:
        lengths: Array of shape [rows]: tokens of each row.
        visual: Array of shape [rows]: visual tokens of each row.
        training: Length, batch size and seed.
        limits: What a pack may hold.

    Yields:
        Pairs of the step, from 0, and the row numbers of a pack, the costliest pack of a step first.
    """
    tokens = math.inf if limits.tokens is None else limits.tokens
    most = np.array([tokens, math.inf, *[limits.budget] * limits.cost.shape[1]])
    # Without limits all fits; the shares below still need finite numbers.
    sizes = np.concatenate([np.stack([lengths, visual], 1), limits.cost], 1).astype(np.float64)
    for step, rows in rows_of_steps(len(lengths), training):
        own = sizes[rows]
        ceiling = np.minimum(most, np.maximum(own.sum(0), 1))
        bins = balanced(own, ceiling, first_fit_decreasing(own, ceiling))
        for items in bins:
            yield step, np.sort(rows[items])


def plan_full_packs(
    lengths: Rows, training: TrainingConfig, capacity: int, packs_per_step: int
) -> Iterator[tuple[int, Rows]]:
    """Full packs, the same number in every step but perhaps the last.

    Args:
        lengths: Array of shape [rows]: tokens of each row, none over the capacity.
        training: Length and seed.
        capacity: Most tokens of a pack.
        packs_per_step: Packs of a step.

    Yields:
        Pairs of the step, from 0, and the row numbers of a pack.
    """
    stream = row_stream(len(lengths), training.seed)
    if training.max_steps is None:
        stream = itertools.islice(stream, num_rows_seen(len(lengths), training))
    packs = filled(lengths, stream, capacity)
    if training.max_steps is not None:
        packs = itertools.islice(packs, training.max_steps * packs_per_step)
    for number, pack in enumerate(packs):
        yield number // packs_per_step, np.sort(np.array(pack, np.int64))


def full_pack_size(lengths: Rows, training: TrainingConfig, limits: PackLimits) -> tuple[int, int]:
    """Capacity of a pack and packs of a step where a step is a number of tokens.

    Args:
        lengths: Array of shape [rows]: tokens of each row.
        training: With `tokens_per_step`.
        limits: What a pack may hold.

    Returns:
        Tokens of a pack, and packs per step.

    Raises:
        ConfigError: The longest row does not fit into a step.
    """
    step, longest = training.tokens_per_step, int(lengths.max())
    assert step is not None
    if longest > step:
        raise ConfigError(
            f"training.tokens_per_step {step} is less than the longest conversation's {longest} tokens; raise it, or lower"
            " data.max_length_tokens"
        )
    # The costliest token of any row bounds what a pack of so many tokens costs.
    by_memory = limits.budget / float((limits.cost / lengths[:, None]).max())
    most = min(step, by_memory, math.inf if limits.tokens is None else limits.tokens)
    packs_per_step = max(1, min(math.ceil(step / most), step // longest))
    capacity = step // packs_per_step
    if training.max_steps is None:
        capacity = _levelled(lengths, training, capacity, packs_per_step)
    return capacity, packs_per_step


def _levelled(lengths: Rows, training: TrainingConfig, capacity: int, packs_per_step: int) -> int:
    """A lower capacity at which as many packs suffice, so that the last one is not left half empty."""
    packs = [pack for _, pack in plan_full_packs(lengths, training, capacity, packs_per_step)]
    total = sum(int(lengths[pack].sum()) for pack in packs)
    for share in _LEVELS:
        lower = max(int(lengths.max()), math.ceil(total / len(packs) * share))
        if lower >= capacity:
            break
        if sum(1 for _ in plan_full_packs(lengths, training, lower, packs_per_step)) <= len(packs):
            return lower
    return capacity
