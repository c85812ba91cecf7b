"""Scores of rows, and the corpus figures made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm.config import EvaluationConfig
from vlm.config.evaluation import MetricName
from vlm.errors import DataError
from vlm.evaluation.intervals import interval, paired_p_value, resampled_values
from vlm.evaluation.metrics import METRICS, cleaner, value
from vlm.evaluation.predictions import Prediction

Scores = npt.NDArray[np.float64]


def score_rows(
    rows: Sequence[Prediction], evaluation: EvaluationConfig, names: Sequence[MetricName] | None = None
) -> Scores:
    """Scores answers.

    Args:
        rows: Answers with their references.
        evaluation: Metrics and normalisation.
        names: Metrics instead of the configured ones.

    Returns:
        Array of shape [rows, metrics, 2]: numerators and denominators.

    Raises:
        DataError: A metric cannot read a row's target; names the row.
    """
    names = evaluation.metric_names if names is None else names
    clean = cleaner(evaluation)
    scores = np.zeros((len(rows), len(names), 2))
    for position, row in enumerate(rows):
        for number, name in enumerate(names):
            try:
                scores[position, number] = METRICS[name].score(row.references, row.prediction, clean)
            except DataError as error:
                raise DataError(f"row {row.id!r} cannot be scored with {name}: {error}") from error
    return scores


def corpus_values(scores: Scores) -> list[float]:
    """Values over all rows.

    Args:
        scores: As `score_rows` gives them.

    Returns:
        One value per metric.
    """
    return [value((numerator, denominator)) for numerator, denominator in scores.sum(axis=0).tolist()]


def figures(
    names: Sequence[MetricName], tuned: Scores, base: Scores | None, cluster_of_row: npt.NDArray[np.int64]
) -> dict[MetricName, dict[str, Any]]:
    """Corpus values with intervals, and how the two models differ.

    Args:
        names: Metrics, in the order of the scores.
        tuned: Array of shape [rows, metrics, 2].
        base: The same of the base model on the same rows, or None.
        cluster_of_row: Array of shape [rows].

    Returns:
        By metric, ``tuned``, ``base`` and ``difference`` with `value`, `low` and `high`, the difference also with
        `p_value`; None for what there is not.
    """
    drawn_tuned = resampled_values(tuned, cluster_of_row)
    drawn_base = None if base is None else resampled_values(base, cluster_of_row)
    values_tuned = corpus_values(tuned)
    values_base = None if base is None else corpus_values(base)
    entries: dict[MetricName, dict[str, Any]] = {}
    for number, name in enumerate(names):
        of_tuned = asdict(interval(values_tuned[number], drawn_tuned[:, number]))
        entries[name] = {"tuned": of_tuned, "base": None, "difference": None}
        if base is None or drawn_base is None or values_base is None:
            continue
        entries[name]["base"] = asdict(interval(values_base[number], drawn_base[:, number]))
        entries[name]["difference"] = asdict(
            interval(
                values_tuned[number] - values_base[number],
                drawn_tuned[:, number] - drawn_base[:, number],
            )
        ) | {"p_value": paired_p_value(tuned[:, number], base[:, number], cluster_of_row)}
    return entries


def worst_first(scored: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[int]:
    """Orders rows by the leading metric of the tuned model.

    Args:
        scored: The rows of ``rows.jsonl``.
        metrics: The entries of ``metrics.json`` by metric, the leading one first.

    Returns:
        Positions in `scored`, worst first, ties in row order.
    """
    name, entry = next(iter(metrics.items()))
    sign = -1 if entry["better"] == "lower" else 1
    return sorted(range(len(scored)), key=lambda position: (sign * scored[position]["tuned"][name], position))
