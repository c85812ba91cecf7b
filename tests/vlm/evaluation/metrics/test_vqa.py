import pytest

from vlm.evaluation.metrics.vqa import processed, vqa_accuracy


@pytest.mark.parametrize(
    ("num_same", "expected"),
    # The known steps of the measure. For three: leaving out one of the three who agree leaves two of three, 2/3; leaving
    # out one of the other seven leaves 1; so (3 · 2/3 + 7 · 1) / 10 = 0.9.
    [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)],
)
def test_ten_people(num_same: int, expected: float) -> None:
    people = ["blue"] * num_same + [f"other {number}" for number in range(10 - num_same)]
    assert vqa_accuracy(people, "Blue.", str) == (pytest.approx(expected), 1)


def test_fewer_people() -> None:
    assert vqa_accuracy(["yes"], "yes", str) == (1, 1)
    assert vqa_accuracy(["yes"], "no", str) == (0, 1)
    # Leaving out the one who agrees leaves nobody, leaving out the other leaves one of one.
    assert vqa_accuracy(["yes", "no"], "yes", str) == (0.5, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("a cat and an owl", "cat and owl"),
        ("1,000", "1000"),  # a comma in a number goes
        ("red,green", "red green"),  # between words, a mark parts them
        ("red, green", "red green"),  # at a word's edge, it goes
        ("t-shirt", "t shirt"),
        ("2.5", "2.5"),
        ("U.S.", "us"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("what time?\n", "what time"),
        ("ten o'clock", "10 o'clock"),
    ],
)
def test_processing(text: str, expected: str) -> None:
    assert processed(text) == expected
