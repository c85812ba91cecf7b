"""Scores predictions: ``metrics.json`` for the corpus, ``rows.jsonl`` for every row, ``figures.json`` for cards.

``metrics.json``::

    {"split": "test", "num_rows": 120, "num_clusters": 120, "interval": {...}, "test": {...}, "normalization": {...},
     "metrics": {"cer": {"title": ..., "better": "lower", "description": ...,
                         "tuned": {"value": 0.03, "low": 0.02, "high": 0.04},
                         "base": {...} or null,
                         "difference": {"value": ..., "low": ..., "high": ..., "p_value": 0.012} or null}},
     "slices": {"language": {"German": {"num_rows": 40, "cer": {"tuned": {...}, "base": ..., "difference": ...}}}},
     "failures": {"repetition": {"tuned": 1, "base": 7 or null}},
     "worst_rows": ["row-17", ...]}

The difference is tuned minus base, on the same resampled rows. The first metric leads: by it, the worst rows are found.

``figures.json`` has of this ``split``, ``num_rows``, ``confidence`` and of each metric ``title``, ``better``, ``tuned`` and
``base``, and nothing that a change of slices or failure kinds would change.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm.config import EvaluationConfig
from vlm.config.evaluation import MetricName
from vlm.errors import DataError
from vlm.evaluation.failures import FAILURE_KINDS, failure_kinds
from vlm.evaluation.intervals import CONFIDENCE, NUM_DRAWS, NUM_SWAPS, SEED, clusters
from vlm.evaluation.metrics import METRICS, cleaner, value
from vlm.evaluation.predictions import Prediction, read_predictions
from vlm.evaluation.scores import Scores, figures, score_rows, worst_first
from vlm.evaluation.slices import slice_values
from vlm.summary import Summary

METRICS_FILE = "metrics.json"
ROWS_FILE = "rows.jsonl"
FIGURES_FILE = "figures.json"
MODELS = ("tuned", "base")
NUM_WORST_ROWS = 50


@dataclass(frozen=True)
class MetricsSummary(Summary):
    """What the tasks show and log."""

    split: str
    """The split that was answered."""
    num_rows: int
    """Rows scored."""
    tuned: dict[str, float]
    """Value of each metric, tuned model."""
    base: dict[str, float] | None
    """Value of each metric, base model; None where it was not evaluated."""


def evaluate_predictions(
    tuned_dir: Path,
    base_dir: Path | None,
    evaluation: EvaluationConfig,
    output_dir: Path,
    figures_dir: Path | None = None,
) -> MetricsSummary:
    """Scores the tuned model's answers, and the base model's beside them.

    Args:
        tuned_dir: Predictions with the adapter.
        base_dir: Predictions of the base model on the same rows, or None.
        evaluation: Metrics and normalisation.
        output_dir: Receives ``metrics.json`` and ``rows.jsonl``.
        figures_dir: Receives ``figures.json``, if wanted.

    Returns:
        The corpus values.

    Raises:
        DataError: No rows, the two folders do not hold the same rows, a metric cannot read a target, or a column to slice
            by is not there.
    """
    summary, tuned_rows = read_predictions(tuned_dir)
    if not tuned_rows:
        raise DataError(
            f"the {summary.split!r} split has no rows to score; raise data.split.{summary.split}_fraction or choose another"
            " generation.split"
        )
    base_rows = None if base_dir is None else read_predictions(base_dir)[1]
    if base_rows is not None:
        _check_same_rows(tuned_rows, base_rows)
    groups = [row.group for row in tuned_rows]
    cluster_of_row, unit = _clusters(groups)
    names = evaluation.metric_names
    rows_of = {"tuned": tuned_rows} | ({} if base_rows is None else {"base": base_rows})
    scores = {who: score_rows(rows, evaluation) for who, rows in rows_of.items()}
    clean = cleaner(evaluation)
    failures = {who: [failure_kinds(row, clean) for row in rows] for who, rows in rows_of.items()}
    metrics: dict[str, dict[str, Any]] = {
        name: {"title": METRICS[name].title, "better": METRICS[name].better, "description": METRICS[name].description}
        | entry
        for name, entry in figures(names, scores["tuned"], scores.get("base"), cluster_of_row).items()
    }
    slices = {column: slice_values(tuned_rows, column) for column in evaluation.slice_by}
    lines = []
    for position, row in enumerate(tuned_rows):
        line: dict[str, Any] = {"id": row.id, "group": row.group, "target": row.target}
        if row.references != [row.target]:
            line["references"] = row.references
        if slices:
            line["slices"] = {column: values[position] for column, values in slices.items()}
        for who, rows in rows_of.items():
            answer, row_scores = rows[position], scores[who][position].tolist()
            line[who] = {
                "prediction": answer.prediction,
                "finish_reason": answer.finish_reason,
                "failures": failures[who][position],
                **{name: value(tuple(score)) for name, score in zip(names, row_scores, strict=True)},
            }
        lines.append(line)
    document = {
        "split": summary.split,
        "num_rows": len(tuned_rows),
        "num_clusters": int(cluster_of_row.max()) + 1,
        "interval": {
            "method": f"percentile bootstrap over {unit}",
            "confidence": CONFIDENCE,
            "draws": NUM_DRAWS,
            "seed": SEED,
        },
        "test": {
            "method": f"paired approximate randomisation over {unit}, two-sided",
            "swaps": NUM_SWAPS,
            "seed": SEED,
        },
        "normalization": evaluation.model_dump(mode="json", exclude={"task", "metrics", "slice_by"}),
        "metrics": metrics,
        "slices": {
            column: _slices(values, names, scores["tuned"], scores.get("base"), groups)
            for column, values in slices.items()
        },
        "failures": {
            kind: {who: sum(kind in kinds for kinds in failures[who]) if who in failures else None for who in MODELS}
            for kind in FAILURE_KINDS
        },
        "worst_rows": [lines[position]["id"] for position in worst_first(lines, metrics)[:NUM_WORST_ROWS]],
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / METRICS_FILE).write_text(
        json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
    )
    with (output_dir / ROWS_FILE).open("w", encoding="utf-8", newline="\n") as handle:
        for line in lines:
            handle.write(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")
    if figures_dir is not None:
        figures_dir.mkdir(parents=True, exist_ok=True)
        (figures_dir / FIGURES_FILE).write_text(
            json.dumps(_of_a_card(document), indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
        )
    return MetricsSummary(
        split=summary.split,
        num_rows=len(tuned_rows),
        tuned={name: entry["tuned"]["value"] for name, entry in metrics.items()},
        base=None if base_rows is None else {name: entry["base"]["value"] for name, entry in metrics.items()},
    )


def _of_a_card(document: dict[str, Any]) -> dict[str, Any]:
    shown = ("title", "better", "tuned", "base")
    return {
        "split": document["split"],
        "num_rows": document["num_rows"],
        "confidence": document["interval"]["confidence"],
        "metrics": {name: {key: entry[key] for key in shown} for name, entry in document["metrics"].items()},
    }


def _clusters(groups: Sequence[str | None]) -> tuple[npt.NDArray[np.int64], str]:
    """The cluster of each row, and what a cluster is."""
    cluster_of_row = clusters(groups)
    if cluster_of_row.max() == 0:
        # Nothing can be said about the spread between groups from one; between its rows is the best there is.
        return clusters([None] * len(groups)), "rows"
    return cluster_of_row, "groups"


def _slices(
    values: Sequence[str], names: Sequence[MetricName], tuned: Scores, base: Scores | None, groups: Sequence[str | None]
) -> dict[str, dict[str, Any]]:
    """Figures of each value's rows, most frequent value first."""
    found: dict[str, dict[str, Any]] = {}
    for name, num_rows in Counter(values).most_common():
        chosen = [position for position, other in enumerate(values) if other == name]
        cluster_of_row, _ = _clusters([groups[position] for position in chosen])
        of_metrics = figures(names, tuned[chosen], None if base is None else base[chosen], cluster_of_row)
        found[name] = {"num_rows": num_rows} | dict(of_metrics.items())
    return found


def _check_same_rows(tuned: list[Prediction], base: list[Prediction]) -> None:
    if [(row.id, row.target) for row in tuned] != [(row.id, row.target) for row in base]:
        raise DataError(
            f"the tuned model's {len(tuned)} rows and the base model's {len(base)} rows are not the same rows;"
            " generate both from one dataset with the same generation settings"
        )
