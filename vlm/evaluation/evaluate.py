"""Scores predictions: ``metrics.json`` for the corpus and ``rows.jsonl`` for every row.

``metrics.json``::

    {"split": "test", "num_rows": 120, "num_clusters": 120, "interval": {...}, "normalization": {...},
     "metrics": {"cer": {"title": ..., "better": "lower", "description": ...,
                         "tuned": {"value": 0.03, "low": 0.02, "high": 0.04},
                         "base": {...} or null, "difference": {...} or null}}}

The difference is tuned minus base, on the same resampled rows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import EvaluationConfig
from vlm.errors import DataError
from vlm.evaluation.intervals import CONFIDENCE, NUM_DRAWS, SEED, clusters, interval, resampled_values
from vlm.evaluation.metrics import METRICS, normalize, value
from vlm.evaluation.predictions import Prediction, read_predictions
from vlm.summary import Summary

METRICS_FILE = "metrics.json"
ROWS_FILE = "rows.jsonl"


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
    tuned_dir: Path, base_dir: Path | None, evaluation: EvaluationConfig, output_dir: Path
) -> MetricsSummary:
    """Scores the tuned model's answers, and the base model's beside them.

    Args:
        tuned_dir: Predictions with the adapter.
        base_dir: Predictions of the base model on the same rows, or None.
        evaluation: Metrics and normalisation.
        output_dir: An existing folder that receives both files.

    Returns:
        The corpus values.

    Raises:
        DataError: No rows, or the two folders do not hold the same rows.
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
    cluster_of_row = clusters([row.group for row in tuned_rows])
    unit = "groups"
    if cluster_of_row.max() == 0:
        # Nothing can be said about the spread between groups from one; between its rows is the best there is.
        cluster_of_row, unit = clusters([None] * len(tuned_rows)), "rows"

    metrics: dict[str, Any] = {}
    row_values: list[dict[str, dict[str, float]]] = [{"tuned": {}, "base": {}} for _ in tuned_rows]
    for name in evaluation.metrics:
        metric = METRICS[name]
        entry: dict[str, Any] = {"title": metric.title, "better": metric.better, "description": metric.description}
        drawn = {}
        for who, rows in (("tuned", tuned_rows), ("base", base_rows)):
            if rows is None:
                entry[who] = None
                continue
            scores = np.array(
                [metric.score(normalize(row.target, evaluation), normalize(row.prediction, evaluation)) for row in rows]
            )
            for values, score in zip(row_values, scores.tolist(), strict=True):
                values[who][name] = value(tuple(score))
            drawn[who] = resampled_values(scores, cluster_of_row)
            numerator, denominator = scores.sum(axis=0).tolist()
            entry[who] = asdict(interval(value((numerator, denominator)), drawn[who]))
        entry["difference"] = (
            asdict(interval(entry["tuned"]["value"] - entry["base"]["value"], drawn["tuned"] - drawn["base"]))
            if base_rows is not None
            else None
        )
        metrics[name] = entry

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
        "normalization": evaluation.model_dump(mode="json", exclude={"metrics"}),
        "metrics": metrics,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / METRICS_FILE).write_text(
        json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
    )
    with (output_dir / ROWS_FILE).open("w", encoding="utf-8", newline="\n") as handle:
        for position, (row, values) in enumerate(zip(tuned_rows, row_values, strict=True)):
            line: dict[str, Any] = {
                "id": row.id,
                "group": row.group,
                "target": row.target,
                "tuned": {"prediction": row.prediction, "finish_reason": row.finish_reason, **values["tuned"]},
            }
            if base_rows is not None:
                base = base_rows[position]
                line["base"] = {"prediction": base.prediction, "finish_reason": base.finish_reason, **values["base"]}
            handle.write(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")
    return MetricsSummary(
        split=summary.split,
        num_rows=len(tuned_rows),
        tuned={name: entry["tuned"]["value"] for name, entry in metrics.items()},
        base=None if base_rows is None else {name: entry["base"]["value"] for name, entry in metrics.items()},
    )


def _check_same_rows(tuned: list[Prediction], base: list[Prediction]) -> None:
    if [(row.id, row.target) for row in tuned] != [(row.id, row.target) for row in base]:
        raise DataError(
            f"the tuned model's {len(tuned)} rows and the base model's {len(base)} rows are not the same rows;"
            " generate both from one dataset with the same generation settings"
        )
