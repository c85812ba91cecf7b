"""Edit distance of LaTeX by tokens.

Source: Deng, Kanervisto, Ling and Rush, "Image-to-Markup Generation with Coarse-to-Fine Attention" (ICML 2017): edits
summed over the corpus, over the summed lengths of the longer of each pair. A distance, so lower is better.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from vlm.evaluation.metrics.metric import Clean, Score, best_of

# A command with its letters, an escaped character, or any other single character.
_TOKEN = re.compile(r"\\(?:[A-Za-z]+\*?|.)|\S", re.DOTALL)
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)"))


def latex_edits(references: Sequence[str], prediction: str, clean: Clean) -> Score:
    """Levenshtein distance in tokens over the longer text's number of tokens.

    White space and the marks around a formula do not count. The declared normalisation is left out: case and
    punctuation mean something in LaTeX.

    Args:
        references: Right answers.
        prediction: The model's answer.
        clean: Not used.
    """
    found = latex_tokens(prediction)
    scores = [
        (float(Levenshtein.distance(expected, found)), float(max(len(expected), len(found))))
        for expected in map(latex_tokens, references)
    ]
    return best_of(scores, "lower")


def latex_tokens(text: str) -> list[str]:
    r"""Splits LaTeX into commands and characters.

    Args:
        text: A formula, with or without ``$``, ``$$``, ``\(`` or ``\[`` around it.

    Returns:
        Tokens without white space.
    """
    text = text.strip()
    for opening, closing in _DELIMITERS:
        if len(text) >= len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)]
            break
    return [token for token in _TOKEN.findall(text) if not (token[0] == "\\" and token[1:].isspace())]
