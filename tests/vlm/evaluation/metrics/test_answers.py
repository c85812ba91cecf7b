"""Every expected number is worked by hand in a comment."""

import pytest

from vlm.evaluation.metrics.answers import anls, relaxed, token_f1


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ("coca cola", "Coca  Cola", 1),  # case and runs of white space do not count
        ("hello", "hallo", 0.8),  # one of five
        ("ab", "ax", 0),  # a distance of exactly one half is over the threshold
        ("abc", "abx", 2 / 3),
        ("abcdefgh", "abcde", 5 / 8),
        ("", "", 1),
        ("a", "", 0),
    ],
)
def test_anls(reference: str, prediction: str, expected: float) -> None:
    assert anls(reference, prediction) == (pytest.approx(expected), 1)


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ("100", "105", 1),  # 5 % exactly
        ("1", "1.05", 1),  # the same in numbers that binary fractions only approach
        ("100", "105.1", 0),
        ("100", "94.9", 0),
        ("-20", "-19", 1),
        ("-20", "20", 0),
        ("25%", "0.25", 1),
        ("25%", "25", 0),
        ("0", "0.0", 1),
        ("0", "0.001", 0),
        ("Yes", "yes", 1),
        ("yes", "no", 0),
        ("2019", "the year 2019", 0),  # words are compared whole
        ("5", "nan", 0),
        ("1e400", "1e401", 0),  # too large for a number: compared as words
    ],
)
def test_relaxed(reference: str, prediction: str, expected: float) -> None:
    assert relaxed(reference, prediction) == (expected, 1)


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ("the Eiffel Tower", "Eiffel tower!", 1),  # article, case and punctuation do not count
        ("Paris, France", "Paris", 2 / 3),  # precision 1, recall 1/2
        ("a b c", "b c d", 2 * 2 / (2 + 3)),  # without the article: b c against b c d
        ("no no yes", "no yes yes", 2 * 2 / 6),  # one no and one yes in common
        ("the", "a", 1),  # nothing is left of either
        ("the", "cat", 0),
    ],
)
def test_token_f1(reference: str, prediction: str, expected: float) -> None:
    assert token_f1(reference, prediction) == (pytest.approx(expected), 1)
