"""What a metric is. Each scores one row as a fraction; a corpus' value is the fraction of the sums.

A row's score is ``(numerator, denominator)``: edits over the reference's length for the error rates (so long references
weigh more, as is usual for CER and WER), a value over one where rows count equally. An *empty reference* (possible only
after normalisation) has length 0: every predicted unit is an insertion that counts in the corpus' numerator, and the
row's own value is the number of insertions, as if the reference had length 1.

A row may have several references, any of which is right. Unless a metric says otherwise, the one counts with which the
answer scores best.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from vlm.config import EvaluationConfig

Score = tuple[float, float]
Clean = Callable[[str], str]
Direction = Literal["lower", "higher"]


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    title: str
    """As a table's heading shows it."""
    better: Direction
    """Direction of improvement."""
    score: Callable[[Sequence[str], str, Clean], Score]
    """Scores ``(references, prediction, clean)``, texts as they came; `clean` is the declared normalisation. Raises
    DataError for a reference that the metric cannot read; a prediction may be anything."""
    description: str
    """One sentence for the report."""


def cleaner(evaluation: EvaluationConfig) -> Clean:
    """Gives the declared normalisation, which is the same for references and predictions.

    Args:
        evaluation: What counts as the same text.

    Returns:
        A function from any text to the one that the metrics see.
    """

    def clean(text: str) -> str:
        if evaluation.unicode_form != "none":
            text = unicodedata.normalize(evaluation.unicode_form, text)
        if evaluation.ignore_case:
            # Not casefold(): it would also make "ß" and "ss" equal, which an OCR metric should see.
            text = text.lower()
        if evaluation.ignore_punctuation:
            text = "".join(char for char in text if not unicodedata.category(char).startswith("P"))
        if evaluation.collapse_whitespace:
            text = re.sub(r"\s+", " ", text).strip()
        return text

    return clean


def value(score: Score) -> float:
    """Turns a row's or a corpus' score into its value; a length of 0 counts as 1."""
    numerator, denominator = score
    return numerator / max(denominator, 1.0)


def by_text(score: Callable[[str, str], Score], better: Direction) -> Callable[[Sequence[str], str, Clean], Score]:
    """Makes a metric's function of one that compares two normalised texts.

    Args:
        score: Scores ``(reference, prediction)``.
        better: Which of several references' scores counts.

    Returns:
        A function for `Metric.score`.
    """

    def best(references: Sequence[str], prediction: str, clean: Clean) -> Score:
        answer = clean(prediction)
        return best_of([score(clean(reference), answer) for reference in references], better)

    return best


def best_of(scores: Sequence[Score], better: Direction) -> Score:
    """The best score, the first of equal ones.

    Args:
        scores: Of one row with each of its references; at least one.
        better: Direction of improvement.
    """
    return (min if better == "lower" else max)(scores, key=value)
