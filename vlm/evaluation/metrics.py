"""The table of metrics. Each scores one row as a fraction; a corpus' value is the fraction of the sums.

A row's score is ``(numerator, denominator)``: edits over the reference's length for the error rates (so long
references weigh more, as is usual for CER and WER), hits over one for the others. An *empty reference* (possible only
after normalisation) has length 0: every predicted unit is an insertion that counts in the corpus' numerator, and the
row's own value is the number of insertions, as if the reference had length 1.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jiwer

from vlm.config import EvaluationConfig

Score = tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    title: str
    """As a table's heading shows it."""
    better: Literal["lower", "higher"]
    """Direction of improvement."""
    score: Callable[[str, str], Score]
    """Scores ``(target, prediction)``, both normalised, as ``(numerator, denominator)``."""
    description: str
    """One sentence for the report."""


def normalize(text: str, evaluation: EvaluationConfig) -> str:
    """Applies the declared normalisation, the same to targets and predictions.

    Args:
        text: Any text.
        evaluation: What counts as the same text.

    Returns:
        The text that the metrics see.
    """
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


def value(score: Score) -> float:
    """Turns a row's or a corpus' score into its value; a length of 0 counts as 1."""
    numerator, denominator = score
    return numerator / max(denominator, 1.0)


def _counts(output: jiwer.WordOutput | jiwer.CharacterOutput) -> Score:
    edits = output.substitutions + output.deletions + output.insertions
    return float(edits), float(output.hits + output.substitutions + output.deletions)


# jiwer's default transforms also strip the ends; here only the declared normalisation changes a text.
_CHARACTERS = jiwer.Compose([jiwer.ReduceToListOfListOfChars()])
_WORDS = jiwer.Compose([jiwer.ReduceToListOfListOfWords()])


def character_edits(target: str, prediction: str) -> Score:
    """Levenshtein distance in Unicode code points, over the target's length in code points."""
    return _counts(jiwer.process_characters(target, prediction, _CHARACTERS, _CHARACTERS))


def word_edits(target: str, prediction: str) -> Score:
    """Levenshtein distance in words (split at white space), over the target's number of words."""
    target, prediction = " ".join(target.split()), " ".join(prediction.split())
    return _counts(jiwer.process_words(target, prediction, _WORDS, _WORDS))


def exact(target: str, prediction: str) -> Score:
    """1 where both are the same text."""
    return float(target == prediction), 1.0


METRICS: dict[str, Metric] = {
    "cer": Metric(
        "Character error rate",
        "lower",
        character_edits,
        "Inserted, deleted and substituted characters per target character.",
    ),
    "wer": Metric("Word error rate", "lower", word_edits, "Inserted, deleted and substituted words per target word."),
    "exact_match": Metric("Exact match", "higher", exact, "Share of answers equal to the target."),
}
