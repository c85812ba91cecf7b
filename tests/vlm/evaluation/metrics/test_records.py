"""Every expected number is worked by hand in a comment."""

import datetime
from decimal import Decimal

import pytest

from vlm.errors import DataError
from vlm.evaluation.metrics.dates import parse_date
from vlm.evaluation.metrics.records import comparable, field_f1


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ('{"a": "1", "b": "2"}', '{"b": 2, "a": 1.0}', (4, 4)),  # numbers, in any order
        ('{"a": "x", "b": "y"}', '{"a": "x", "b": "z"}', (2, 4)),  # one of two on both sides
        ('{"a": "x"}', '{"a": "x", "b": "y"}', (2, 3)),  # precision 1/2, recall 1
        ('{"menu": [{"nm": "tea"}, {"nm": "tea"}]}', '{"menu": [{"nm": "tea"}]}', (2, 3)),  # repetitions count
        ('{"menu": {"nm": "tea"}}', '{"nm": "tea"}', (0, 2)),  # another path
        ('{"a": "x"}', 'Here:\n```json\n{"a": "x"}\n```', (2, 2)),
        ('{"a": "x"}', "a: x", (0, 1)),
        ('{"a": null, "b": " "}', "{}", (2, 2)),  # rightly empty
        ("{}", "nothing", (0, 1)),
        ("{}", '{"a": 1}', (0, 1)),
        ('["x", true]', '["x", "true"]', (2, 4)),  # a text is no boolean
    ],
)
def test_field_f1(reference: str, prediction: str, expected: tuple[float, float]) -> None:
    assert field_f1([reference], prediction, str) == expected


def test_a_target_without_json_is_refused() -> None:
    with pytest.raises(DataError, match=r"the target 'Total 7' is no JSON"):
        field_f1(["Total 7"], "{}", str)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("1,234.50", Decimal("1234.5")),
        ("1.234,5", Decimal("1234.50")),
        ("12,50", "12.5"),
        ("1,234", 1234),
        ("-3", -3),
        ("2024-03-01", "01.03.2024"),
        ("1 March 2024", "Mar 1, 2024"),
        ("31/12/2024", "12/31/2024"),  # only one way to read either
        ("02/02/2024", "2024-02-02"),
        ("1st of", "1st of"),
        ("3/4/2024", "03/04/2024"),
    ],
)
def test_the_same(left: object, right: object) -> None:
    assert comparable(left, str) == comparable(right, str)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("007", "7"),  # a name
        ("12.50 EUR", "12.50"),
        ("1,23,4", "1234"),
        ("3/4/2024", "2024-04-03"),  # may be either day
        ("3/4/2024", "2024-03-04"),
        ("31.02.2024", "02.03.2024"),  # no such day
        (True, 1),
        ("true", True),
        ("A", "a"),
    ],
)
def test_not_the_same(left: object, right: object) -> None:
    assert comparable(left, str) != comparable(right, str)


def test_dates() -> None:
    day = datetime.date(2024, 5, 7)
    for text in ("2024-05-07", "2024/5/7", "7.5.2024", "7 May 2024", "7th May, 2024", "May 7th 2024", "07-may-2024"):
        assert parse_date(text) == day, text
    for text in ("2024-5/7", "7 Mai 2024", "May 2024", "2024-13-01", "on 2024-05-07"):
        assert parse_date(text) is None, text
