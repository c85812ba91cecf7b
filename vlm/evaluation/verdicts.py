"""Whether one model is better than another, from the paired difference of a metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from vlm.evaluation.intervals import CONFIDENCE

Verdict = Literal["better", "worse", "no clear difference"]

SIGNIFICANCE = round(1 - CONFIDENCE, 6)


def verdict(entry: Mapping[str, Any]) -> Verdict | None:
    """Judges the first of two models by a metric's entry in ``metrics.json``.

    Args:
        entry: Has `better` (``lower`` or ``higher``) and `difference`, first minus second: its value, the interval's ends
            `low` and `high`, and `p_value` where one was computed.

    Returns:
        ``better`` or ``worse`` only where the interval excludes zero and the p-value, if there is one, is below 5 %; None
        where nothing was compared.
    """
    difference = entry.get("difference")
    if difference is None:
        return None
    p_value = difference.get("p_value")
    if difference["low"] <= 0 <= difference["high"] or (p_value is not None and p_value >= SIGNIFICANCE):
        return "no clear difference"
    return "better" if (difference["value"] < 0) == (entry["better"] == "lower") else "worse"
