"""Metrics of short answers: exact match, ANLS, relaxed accuracy and token F1."""

from __future__ import annotations

import math
import re
import string
from collections import Counter

from rapidfuzz.distance import Levenshtein

from vlm.evaluation.metrics.metric import Score

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact(reference: str, prediction: str) -> Score:
    """1 where both are the same text."""
    return float(reference == prediction), 1.0


def anls(reference: str, prediction: str) -> Score:
    """Normalised Levenshtein similarity, where a similarity below the threshold counts as none.

    Source: Biten et al., "Scene Text Visual Question Answering" (ICCV 2019), equation 1. As there, letter case and runs
    of white space do not count; a distance of exactly half the longer text's length is too much.
    """
    reference, prediction = (" ".join(text.lower().split()) for text in (reference, prediction))
    longer = max(len(reference), len(prediction))
    distance = Levenshtein.distance(reference, prediction) / longer if longer else 0.0
    return (1.0 - distance if distance < ANLS_THRESHOLD else 0.0), 1.0


def relaxed(reference: str, prediction: str) -> Score:
    """1 where numbers differ by at most 5 % of the reference, or where texts are the same but for letter case.

    Source: Methani et al., "PlotQA" (WACV 2020), and Masry et al., "ChartQA" (Findings of ACL 2022). A percentage is its
    hundredth. A reference of 0 asks for 0.
    """
    expected, found = _number(reference), _number(prediction)
    if expected is None or found is None:
        return float(reference.strip().lower() == prediction.strip().lower()), 1.0
    # Slack for what decimal fractions lose in binary: 1.05 is within 5 % of 1.
    slack = 1e-9 * abs(expected)
    return float(abs(found - expected) <= RELAXED_TOLERANCE * abs(expected) + slack), 1.0


def token_f1(reference: str, prediction: str) -> Score:
    """F1 of the two bags of words, without letter case, punctuation and articles.

    Source: Rajpurkar et al., "SQuAD" (EMNLP 2016), section 6.1, with the normalisation of its evaluation script. Two
    texts without any word are equal.
    """
    expected, found = _words(reference), _words(prediction)
    if not expected or not found:
        return float(expected == found), 1.0
    num_common = (Counter(expected) & Counter(found)).total()
    return 2 * num_common / (len(expected) + len(found)), 1.0


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _number(text: str) -> float | None:
    text = text.strip()
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    if not _NUMBER.fullmatch(text):
        return None
    number = float(text) / (100 if percent else 1)
    return number if math.isfinite(number) else None
