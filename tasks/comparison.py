"""Paired comparison of two models by their stored answers to the same rows."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tasks.graph import Json
from vlm.config import EvaluationConfig


def compare_answers(first_dir: Path, second_dir: Path, evaluation: EvaluationConfig) -> Json:
    """Scores two models on the same rows, with the paired difference of every metric.

    Args:
        first_dir: Folder of a predictions artifact.
        second_dir: Another one.
        evaluation: Metrics and normalisation, the same for both.

    Returns:
        As ``metrics.json``: `tuned` is the first model, `base` the second, `difference` first minus second.

    Raises:
        DataError: They did not answer the same rows.
    """
    from vlm.evaluation.evaluate import evaluate_predictions

    with tempfile.TemporaryDirectory() as folder:
        evaluate_predictions(first_dir, second_dir, evaluation, Path(folder))
        document: Json = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    return document


def compare_common_answers(first_dir: Path, second_dir: Path, evaluation: EvaluationConfig) -> Json | None:
    """As ``compare_answers``, on the rows that both answered: data that grows brings new rows to its test split, too.

    Args:
        first_dir: Folder of a predictions artifact.
        second_dir: Another one.
        evaluation: Metrics and normalisation, the same for both.

    Returns:
        The document, or None where they answered no row in common.
    """
    from vlm.evaluation.predictions import write_common_rows

    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        first.mkdir()
        second.mkdir()
        if write_common_rows(first_dir, second_dir, first, second) == 0:
            return None
        return compare_answers(first, second, evaluation)
