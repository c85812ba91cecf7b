"""Bootstrap intervals of corpus metrics (Efron's percentile method), by cluster and paired.

Rows of one group (pages of one document, say) are not independent, so whole groups are drawn. The tuned and the base
model are scored on the same draws, which makes the interval of their difference much narrower than those of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_DRAWS = 2000
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
        scores: Array of shape [rows, 2]: numerators and denominators.
        cluster_of_row: Array of shape [rows].

    Returns:
        Array of shape [draws]. The draws depend on the number of clusters only, so two calls on the same rows are
        paired.
    """
    num_clusters = int(cluster_of_row.max()) + 1
    sums = np.zeros((num_clusters, 2))
    np.add.at(sums, cluster_of_row, scores)
    generator = np.random.default_rng(SEED)
    drawn = np.empty((NUM_DRAWS, 2))
    for draw in range(NUM_DRAWS):  # one draw at a time: memory stays linear in the rows
        picks = generator.integers(num_clusters, size=num_clusters)
        drawn[draw] = np.bincount(picks, minlength=num_clusters) @ sums
    values: npt.NDArray[np.float64] = drawn[:, 0] / np.maximum(drawn[:, 1], 1.0)
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
