"""Whether an answer is in another language than its references, for languages that share the Latin alphabet.

A language is told by py3langid (naive Bayes over byte n-grams; Lui and Baldwin, "langid.py: An Off-the-shelf Language
Identification Tool", ACL 2012). Its probabilities are taken over all of its languages, not only over those judged here,
so that a text in any other language is left alone rather than forced into one of these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rapidfuzz.distance import Levenshtein

# Of 2,467 passages of at least so many words and letters, cut out of 70 sentences in these languages, 1,936 were told
# with such a probability, none wrongly; nor was any of 6,000 copies with 10 to 50 % of their characters misread. Languages
# that are easily taken for one another (Danish and Norwegian, Czech and Slovak, Spanish and Galician) are not both here.
_LANGUAGES = frozenset({"cs", "de", "en", "es", "fi", "fr", "hu", "it", "nl", "pl", "pt", "ro", "sv", "tr"})
_WORDS = 4
_LETTERS = 20
_PROBABILITY = 0.9
# Telling takes a microsecond per character, and more than this changes little.
_CHARACTERS = 500
# Spanish and Portuguese sentences of one meaning are up to 0.69 alike.
_ALIKE = 0.75

_WORD = re.compile(r"[^\W\d_]{2,}")
# Its keywords are English whatever the text is: JSON, LaTeX, HTML, code.
_MARKUP = re.compile(r"[\\{}<>=_]")


def is_wrong_language(answer: str, references: Sequence[str]) -> bool:
    """Whether an answer is in a language in which no reference is.

    It is said only where it is sure, so most short answers are never said to be in any language:

    - The answer and each reference have at least four words in small letters and 20 letters in all. Names, addresses, item
      lists, numbers and codes have few such words.
    - None has a backslash, a brace, or one of ``< > = _``, as JSON, LaTeX, HTML and code do.
    - Each is in one of 14 languages with a probability of at least 0.9 (Czech, Dutch, English, Finnish, French, German,
      Hungarian, Italian, Polish, Portuguese, Romanian, Spanish, Swedish, Turkish), by its first 500 characters.
    - The answer is no misreading of a reference (three quarters alike by edit distance), nor does half of its words stand
      in one, as where it is the one foreign passage of a document.

    A change of language within an answer is not found, nor one between dialects.

    Args:
        answer: What the model said.
        references: Right answers; at least one.
    """
    # The cheap tests first: most answers end here.
    if not _is_prose(answer) or not all(map(_is_prose, references)):
        return False
    words = _small_words(answer)
    for reference in references:
        if len(words & _small_words(reference)) * 2 >= len(words):
            return False
        if Levenshtein.normalized_similarity(answer, reference, score_cutoff=_ALIKE):
            return False
    found = language(answer)
    expected = [language(reference) for reference in references]
    return found is not None and None not in expected and found not in expected


@lru_cache(maxsize=4096)
def language(text: str) -> str | None:
    """Tells the language of a text that is long enough.

    Args:
        text: Any text.

    Returns:
        Its ISO 639-1 code; None for a language that is not judged, and where it cannot be told.
    """
    if not _is_prose(text):
        return None
    code, probability = _identifier().classify(text[:_CHARACTERS])
    return code if probability >= _PROBABILITY and code in _LANGUAGES else None


def _small_words(text: str) -> frozenset[str]:
    return frozenset(word for word in _WORD.findall(text) if word.islower())


def _is_prose(text: str) -> bool:
    if _MARKUP.search(text):
        return False
    words = _WORD.findall(text[:_CHARACTERS])
    return sum(map(str.islower, words)) >= _WORDS and sum(map(len, words)) >= _LETTERS


@lru_cache(maxsize=1)
def _identifier() -> Any:
    # Its model takes a second to unpack, and most runs have no text to judge.
    from py3langid.langid import LanguageIdentifier

    return LanguageIdentifier.from_model_file("data/model.npz.xz", norm_probs=True)
