"""Every expected number is worked by hand in a comment."""

import pytest

from vlm.config import EvaluationConfig
from vlm.evaluation.metrics import METRICS, cleaner, value


def as_is(text: str) -> str:
    return text


@pytest.mark.parametrize(
    ("target", "prediction", "score"),
    [
        ("kitten", "sitting", (3, 6)),  # k→s, e→i, g inserted
        ("abc", "abc", (0, 3)),
        ("abc", "", (3, 3)),  # three deletions
        ("", "xy", (2, 0)),  # two insertions over an empty reference
        ("", "", (0, 0)),
        (" a ", "a", (2, 3)),  # spaces count when normalisation left them there
        ("日本", "日木", (1, 2)),  # code points, not bytes
        ("a\nb", "a b", (1, 3)),
    ],
)
def test_character_edits(target: str, prediction: str, score: tuple[float, float]) -> None:
    assert METRICS["cer"].score([target], prediction, as_is) == score


@pytest.mark.parametrize(
    ("target", "prediction", "score"),
    [
        ("the cat sat", "the cat sat", (0, 3)),
        ("the cat sat", "a cat", (2, 3)),  # the→a, sat deleted
        ("the cat", "the\n cat", (0, 2)),
        ("", "one two", (2, 0)),
        ("one", "", (1, 1)),
    ],
)
def test_word_edits(target: str, prediction: str, score: tuple[float, float]) -> None:
    assert METRICS["wer"].score([target], prediction, as_is) == score


@pytest.mark.parametrize(
    ("target", "prediction", "score"),
    [
        # One hit, one substitution, two insertions: WER is 3/2, but 3 of the 4 aligned pairs do not match.
        ("the cat", "the dog ran off", (3, 4)),
        ("one two three", "two", (2, 3)),
        ("", "one", (1, 1)),
        ("", "", (0, 0)),
    ],
)
def test_word_mismatches(target: str, prediction: str, score: tuple[float, float]) -> None:
    assert METRICS["mer"].score([target], prediction, as_is) == score


def test_of_several_references_the_nearest_counts() -> None:
    # 1 of 4 characters against "cats", 3 of 3 against "dog".
    assert METRICS["cer"].score(["dog", "cats"], "cat", as_is) == (1, 4)
    assert METRICS["exact_match"].score(["dog", "cat"], "cat", as_is) == (1, 1)


def test_value_of_an_empty_reference_is_its_number_of_insertions() -> None:
    assert value((2, 0)) == 2
    assert value((0, 0)) == 0
    assert value((1, 4)) == 0.25


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        ({}, "  a \n b ", "a b"),
        ({"collapse_whitespace": False}, " a  b", " a  b"),
        ({"ignore_case": True}, "Straße ABC", "straße abc"),
        ({"ignore_punctuation": True}, "a, b! (c) “d” $5", "a b c d $5"),  # $ is a symbol, not punctuation
        ({}, "e\u0301", "é"),
        ({"unicode_form": "none"}, "e\u0301", "e\u0301"),
        ({"unicode_form": "NFKC"}, "ﬁ²", "fi2"),
        ({"ignore_punctuation": True}, "a - b", "a b"),  # white space is collapsed after punctuation is gone
    ],
)
def test_cleaner(settings: dict, text: str, expected: str) -> None:
    assert cleaner(EvaluationConfig(**settings))(text) == expected
