"""How answers fail, as far as a text tells: kinds by which a report can be filtered."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from vlm.evaluation.languages import is_wrong_language
from vlm.evaluation.metrics.metric import Clean
from vlm.evaluation.metrics.records import parse_json
from vlm.evaluation.predictions import Prediction

FailureKind = Literal["empty", "truncated", "repetition", "wrong_case", "wrong_script", "wrong_language", "not_json"]
FAILURE_KINDS: tuple[FailureKind, ...] = get_args(FailureKind)

# A passage counts as repeated when it stands there so many times without a break, over so many characters.
_TIMES = 4
_REPEATED_CHARACTERS = 20
_LONGEST_UNIT = 300
# Fewer letters may be a sign or an abbreviation in any script.
_SCRIPT_LETTERS = 3


def failure_kinds(row: Prediction, clean: Clean) -> list[FailureKind]:
    """Names what is visibly wrong with an answer; a wrong answer may have no such name, or several.

    - ``empty``: nothing but white space, where something was expected.
    - ``truncated``: cut at the length limit.
    - ``repetition``: a passage over and over, much longer than any such run in the references.
    - ``wrong_case``: right but for letter case.
    - ``wrong_script``: most letters are of a writing system that no reference uses.
    - ``wrong_language``: sentences in a language of the Latin alphabet in which no reference is, where that can be told
      for sure (`vlm.evaluation.languages.is_wrong_language`).
    - ``not_json``: JSON was expected and something else came.

    Args:
        row: An answer with its references.
        clean: The declared normalisation; what it takes away is no failure.

    Returns:
        Kinds in the order of `FAILURE_KINDS`.
    """
    answer, references = clean(row.prediction), [clean(reference) for reference in row.references]
    right = answer in references
    loop = repeated_characters(row.prediction)
    found = {
        "empty": not answer.strip() and not right,
        "truncated": row.finish_reason == "length",
        "repetition": loop > 2 * max(map(repeated_characters, row.references)),
        "wrong_case": not right and answer.casefold() in {reference.casefold() for reference in references},
        "wrong_script": _is_wrong_script(answer, references),
        "wrong_language": not right and is_wrong_language(row.prediction, row.references),
        "not_json": any(map(_is_json_structure, row.references)) and not _is_json_structure(row.prediction),
    }
    return [kind for kind in FAILURE_KINDS if found[kind]]


def repeated_characters(text: str) -> int:
    """Length of the longest passage that says one thing at least four times in a row.

    Args:
        text: Any text.

    Returns:
        Characters of all its repetitions; 0 for fewer than 20, or fewer than four times.
    """
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    longest = 0
    if len(characters) < _REPEATED_CHARACTERS:
        return longest
    for unit in range(1, min((len(characters) + 1) // _TIMES, _LONGEST_UNIT) + 1):
        breaks = np.flatnonzero(characters[unit:] != characters[:-unit])
        edges = np.concatenate(([-1], breaks, [len(characters) - unit]))
        same = int(np.diff(edges).max()) - 1
        # The last time, the space behind it may be missing.
        if same >= (_TIMES - 1) * unit - 1:
            longest = max(longest, same + unit)
    return longest if longest >= _REPEATED_CHARACTERS else 0


def _is_wrong_script(answer: str, references: Sequence[str]) -> bool:
    found = Counter(script for script in map(_script, answer) if script)
    expected = {script for reference in references for script in map(_script, reference) if script}
    if found.total() < _SCRIPT_LETTERS or not expected:
        return False
    return found.most_common(1)[0][0] not in expected


@lru_cache(maxsize=4096)
def _script(char: str) -> str | None:
    """The first word of a letter's name, such as LATIN, CYRILLIC or CJK; None for what is no letter."""
    return unicodedata.name(char, "").split(" ", 1)[0] or None if char.isalpha() else None


def _is_json_structure(text: str) -> bool:
    if not any(char in text for char in "{["):
        return False
    try:
        return isinstance(parse_json(text), dict | list)
    except ValueError:
        return False
