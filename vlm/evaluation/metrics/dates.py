"""Calendar dates in the ways that documents write them."""

from __future__ import annotations

import datetime
import re

_MONTHS = {
    name: number
    for number, names in enumerate(
        (
            "january jan",
            "february feb",
            "march mar",
            "april apr",
            "may",
            "june jun",
            "july jul",
            "august aug",
            "september sep sept",
            "october oct",
            "november nov",
            "december dec",
        ),
        1,
    )
    for name in names.split()
}
_YEAR_FIRST = re.compile(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})", re.ASCII)
_YEAR_LAST = re.compile(r"(\d{1,2})([-/.])(\d{1,2})\2(\d{4})", re.ASCII)
_DAY_MONTH = re.compile(r"(\d{1,2})(?:st|nd|rd|th)?[\s.-]+([a-z]{3,9})\.?,?[\s-]+(\d{4})", re.ASCII)
_MONTH_DAY = re.compile(r"([a-z]{3,9})\.?\s+(\d{1,2})(?:st|nd|rd|th)?,?\s+(\d{4})", re.ASCII)


def parse_date(text: str) -> datetime.date | tuple[int, int, int] | None:
    """Reads a date, if a text is one and nothing else.

    Args:
        text: Without white space around it.

    Returns:
        The date. Where day and month cannot be told apart (``03/04/2024``), the three numbers as they stand, which are
        equal to no date: what may be wrong does not count as right. Points part day, month and year in this order. None
        for any other text.
    """
    lower = text.lower()
    if match := _YEAR_FIRST.fullmatch(lower):
        return _date(int(match[1]), int(match[3]), int(match[4]))
    if match := _YEAR_LAST.fullmatch(lower):
        first, second, year = int(match[1]), int(match[3]), int(match[4])
        if match[2] == "." or first == second or first > 12:
            return _date(year, second, first)
        return _date(year, first, second) if second > 12 else (first, second, year)
    if match := _DAY_MONTH.fullmatch(lower):
        return _date(int(match[3]), _MONTHS.get(match[2], 0), int(match[1]))
    if match := _MONTH_DAY.fullmatch(lower):
        return _date(int(match[3]), _MONTHS.get(match[1], 0), int(match[2]))
    return None


def _date(year: int, month: int, day: int) -> datetime.date | None:
    try:
        return datetime.date(year, month, day)
    except ValueError:
        return None
