"""VQA accuracy with the answer processing of its evaluation server.

Sources: Antol et al., "VQA: Visual Question Answering" (ICCV 2015), for the measure; visualqa.org/evaluation for the
average over subsets and the processing, which TextVQA (Singh et al., CVPR 2019) also uses. Every answer is processed,
also where all references agree, as TextVQA's server does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlm.evaluation.metrics.metric import Clean, Score

# An answer that three people gave is right.
_ENOUGH = 3
_ARTICLES = {"a", "an", "the"}
_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def vqa_accuracy(references: Sequence[str], prediction: str, clean: Clean) -> Score:
    """Agreement with people: the share of three of them that gave the answer, at most 1.

    It is averaged over all ways of leaving one person out, so that people compared with each other reach no more. A row
    with a single reference has nobody to leave out: there, the answer is right or wrong.

    Args:
        references: What people answered, ten in VQA and TextVQA, with repetitions.
        prediction: The model's answer.
        clean: The declared normalisation, applied before the processing.

    Returns:
        A value between 0 and 1, over 1.
    """
    answer = processed(clean(prediction))
    given = [processed(clean(reference)) == answer for reference in references]
    if len(given) == 1:
        return float(given[0]), 1.0
    num_same = sum(given)
    # Fewer than four people: as many as are left when one is out.
    enough = min(_ENOUGH, len(given) - 1)
    accuracies = [min(1.0, (num_same - is_same) / enough) for is_same in given]
    return sum(accuracies) / len(accuracies), 1.0


def processed(text: str) -> str:
    """An answer as the evaluation server compares it.

    Args:
        text: Any answer.

    Returns:
        Lower case, without most punctuation and articles, small numbers as digits, contractions with apostrophe.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joined = text
    for mark in _PUNCTUATION:
        # A mark at a word's edge goes, and so does any mark once a comma stands in a number; others part two words.
        at_an_edge = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text) is not None
        joined = joined.replace(mark, "" if at_an_edge else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", joined).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _misspelt(contractions: Sequence[str]) -> dict[str, str]:
    """Spellings that lack one apostrophe or all, unless they are words of their own."""
    table = {}
    for word in contractions:
        spots = [spot for spot, char in enumerate(word) if char == "'"]
        for left_out in [[spot] for spot in spots] + [spots]:
            spelling = "".join(char for spot, char in enumerate(word) if spot not in left_out)
            table[spelling] = word
    return table


_CONTRACTIONS = _misspelt(
    [
        *(
            f"{verb}n't"
            for verb in [
                "ai",
                "are",
                "ca",
                "could",
                "did",
                "does",
                "do",
                "had",
                "has",
                "have",
                "is",
                "might",
                "must",
                "need",
                "ought",
                "sha",
                "should",
                "was",
                "were",
                "wo",
                "would",
            ]
        ),
        *(f"{verb}n't've" for verb in ["could", "had", "might", "must", "should", "would"]),
        *(
            f"{verb}'ve"
            for verb in ["could", "i", "might", "must", "should", "they", "we", "what", "who", "would", "you"]
        ),
        *(
            f"{word}'d"
            for word in [
                "he",
                "how",
                "somebody",
                "someone",
                "something",
                "that",
                "there",
                "they",
                "where",
                "who",
                "you",
            ]
        ),
        *(
            f"{word}'d've"
            for word in [
                "he",
                "i",
                "it",
                "she",
                "somebody",
                "someone",
                "something",
                "there",
                "they",
                "we",
                "who",
                "you",
            ]
        ),
        *(
            f"{word}'ll"
            for word in ["how", "somebody", "someone", "something", "that", "they", "what", "who", "you", "y'a"]
        ),
        *(
            f"{word}'s"
            for word in [
                "he",
                "here",
                "how",
                "somebody",
                "someone",
                "something",
                "that",
                "there",
                "what",
                "when",
                "where",
                "who",
                "why",
            ]
        ),
        *(f"{word}'re" for word in ["they", "what", "why", "you"]),
        *("i'm", "ma'am", "o'clock", "'ow's'at", "'twas", "y'all", "y'all'll", "y'all'd've"),
    ]
)
