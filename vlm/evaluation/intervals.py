"""Bootstrap intervals of corpus metrics and a paired test of their difference, both by cluster.

Rows of one group (pages of one document, say) are not independent, so whole groups are drawn or swapped. The tuned and
the base model are scored on the same draws, which makes the interval of their difference much narrower than those of
the two.

Sources: Efron, "Bootstrap Methods: Another Look at the Jackknife" (1979), for percentile intervals; Noreen,
"Computer-Intensive Methods for Testing Hypotheses" (1989), for approximate randomisation; Riezler and Maxwell, "On Some
Pitfalls in Automatic Evaluation and Significance Testing for MT" (2005), for why the test is this one and not a
bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_DRAWS = 2000
NUM_SWAPS = 9999
_SWAPS_AT_A_TIME = 256
CONFIDENCE = 0.95
SEED = 0


@dataclass(frozen=True)
class Interval:
    """A corpus value and its interval."""

    value: float
    """The value on all rows."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""


def clusters(groups: Sequence[str | None]) -> npt.NDArray[np.int64]:
    """Numbers the clusters of rows.

    Args:
        groups: One group per row; None makes the row a cluster of its own.

    Returns:
        Array of shape [rows]: the cluster of each row, counted from 0 in order of first appearance.
    """
    numbers: dict[tuple[str, str | int], int] = {}
    keys: list[tuple[str, str | int]] = [
        ("group", group) if group is not None else ("row", position) for position, group in enumerate(groups)
    ]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def resampled_values(scores: npt.NDArray[np.float64], cluster_of_row: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Corpus values of drawn datasets.

    Args:
        scores: Array of shape [rows, …, 2]: numerators and denominators, of one metric or several.
        cluster_of_row: Array of shape [rows].

    Returns:
        Array of shape [draws, …]. The draws depend on the number of clusters only, so two calls on the same rows are
        paired.
    """
    num_clusters = int(cluster_of_row.max()) + 1
    flat = scores.reshape(len(scores), -1)
    sums = np.zeros((num_clusters, flat.shape[1]))
    np.add.at(sums, cluster_of_row, flat)
    generator = np.random.default_rng(SEED)
    drawn = np.empty((NUM_DRAWS, flat.shape[1]))
    for draw in range(NUM_DRAWS):  # one draw at a time: memory stays linear in the rows
        picks = generator.integers(num_clusters, size=num_clusters)
        drawn[draw] = np.bincount(picks, minlength=num_clusters) @ sums
    drawn = drawn.reshape(NUM_DRAWS, *scores.shape[1:])
    values: npt.NDArray[np.float64] = drawn[..., 0] / np.maximum(drawn[..., 1], 1.0)
    return values


def interval(value: float, drawn: npt.NDArray[np.float64]) -> Interval:
    """Wraps a value with the percentiles of its draws.

    Args:
        value: On all rows.
        drawn: Array of shape [draws].

    Returns:
        The value with its 95 % interval.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def paired_p_value(
    tuned: npt.NDArray[np.float64], base: npt.NDArray[np.float64], cluster_of_row: npt.NDArray[np.int64]
) -> float:
    """Approximate randomisation test of the difference of two corpus values, two-sided.

    If the two models were equally good, it would not matter whose answer to a row is whose. So answers are swapped at
    random, whole clusters at a time: the p-value is the share of swaps after which the two differ at least as much as
    they really do, the real one counted among them.

    Args:
        tuned: Array of shape [rows, 2]: numerators and denominators.
        base: The same of the other model on the same rows.
        cluster_of_row: Array of shape [rows].

    Returns:
        Between ``1 / (NUM_SWAPS + 1)`` and 1.
    """
    num_clusters = int(cluster_of_row.max()) + 1
    sums = np.zeros((2, num_clusters, 2))
    np.add.at(sums[0], cluster_of_row, tuned)
    np.add.at(sums[1], cluster_of_row, base)
    whole = sums.sum(axis=(0, 1))
    change = sums[0] - sums[1]
    lowest = sums[1].sum(axis=0)

    def difference(first: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        second = whole - first
        gap: npt.NDArray[np.float64] = np.abs(
            first[:, 0] / np.maximum(first[:, 1], 1.0) - second[:, 0] / np.maximum(second[:, 1], 1.0)
        )
        return gap

    # Sums in another order differ by rounding; what is equal up to that counts as equal.
    observed = float(difference(sums[0].sum(axis=0)[None])[0]) - 1e-12
    generator = np.random.default_rng(SEED)
    num_as_large = 0
    for start in range(0, NUM_SWAPS, _SWAPS_AT_A_TIME):  # memory stays linear in the clusters
        count = min(_SWAPS_AT_A_TIME, NUM_SWAPS - start)
        stays = generator.integers(2, size=(count, num_clusters)).astype(np.float64)
        num_as_large += int((difference(lowest + stays @ change) >= observed).sum())
    return (num_as_large + 1) / (NUM_SWAPS + 1)
