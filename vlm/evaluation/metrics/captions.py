"""Metrics of longer texts in free words: chrF and ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from rapidfuzz.distance import LCSseq

from vlm.evaluation.metrics.metric import Clean, Score

_WORD = re.compile(r"\w+")


def chrf(references: Sequence[str], prediction: str, clean: Clean) -> Score:
    """Character n-gram F-score of a row, between 0 and 1, counted by sacrebleu (n up to 6, beta 2).

    Source: Popović, "chrF: character n-gram F-score for automatic MT evaluation" (WMT 2015). A corpus' value is the mean
    of its rows.
    """
    score = _sacrebleu_chrf().sentence_score(clean(prediction), [clean(reference) for reference in references])
    return float(score.score) / 100, 1.0


def rouge_l(reference: str, prediction: str) -> Score:
    """F1 of the longest common subsequence of words, in lower case and without punctuation.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), section 3.1, with beta 1. A corpus'
    value is the mean of its rows; two texts without any word are equal.
    """
    expected, found = (_WORD.findall(text.lower()) for text in (reference, prediction))
    if not expected or not found:
        return float(expected == found), 1.0
    return 2 * LCSseq.similarity(expected, found) / (len(expected) + len(found)), 1.0


@cache
def _sacrebleu_chrf() -> Any:
    # Loads what it needs for other metrics as well; whoever does not ask for chrF shall not wait.
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()
