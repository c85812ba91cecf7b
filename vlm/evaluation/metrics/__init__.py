"""Metrics of answers: the table, and what goes around it. One file per kind."""

from vlm.evaluation.metrics.metric import Metric, Score, cleaner, value
from vlm.evaluation.metrics.table import METRICS

__all__ = ["METRICS", "Metric", "Score", "cleaner", "value"]
