"""F1 over the fields of JSON answers.

Source: Kim et al., "OCR-free Document Understanding Transformer" (Donut, ECCV 2022), section 3.2.1: fields are counted
over the whole corpus. Other than there, values that are numbers or dates are compared as such.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from decimal import Decimal
from typing import Any

from vlm.errors import DataError
from vlm.evaluation.metrics.dates import parse_date
from vlm.evaluation.metrics.metric import Clean, Score, best_of

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL | re.IGNORECASE)
# Digits as one run or in groups of three, then decimals; points and commas in either role.
_POINT_DECIMAL = re.compile(r"-?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?")
_COMMA_DECIMAL = re.compile(r"-?(?:\d{1,3}(?:\.\d{3})+,\d+|\d+,(?:\d{1,2}|\d{4,}))")
# Deeper than any document, and shallow enough for functions that call themselves.
_MAX_DEPTH = 100
_LEADING_ZERO = re.compile(r"-?0\d")


def field_f1(references: Sequence[str], prediction: str, clean: Clean) -> Score:
    """Twice the fields that are right, over the fields of both answers together.

    A field is a path of keys with a value, such as ``menu.price = 2.50``; places in lists do not count, repetitions do.
    Empty values (``null``, ``""``) are no fields. An answer that is no JSON has no right field.

    Args:
        references: JSON texts.
        prediction: The model's answer; a code fence around it does not count.
        clean: The declared normalisation, applied to values that are text.

    Raises:
        DataError: A reference is no JSON.
    """
    try:
        found = Counter(fields(parse_json(prediction), clean))
        readable = True
    except ValueError:
        found, readable = Counter(), False
    scores = []
    for reference in references:
        expected = Counter(fields(parse_reference(reference), clean))
        num_fields = expected.total() + found.total()
        if num_fields == 0 and readable:
            # Rightly empty: worth as much as one right field.
            scores.append((2.0, 2.0))
            continue
        # Where nothing was expected, what cannot be read counts as one wrong field.
        scores.append((2.0 * (expected & found).total(), float(max(num_fields, 1))))
    return best_of(scores, "higher")


def parse_json(text: str) -> Any:
    """Reads JSON, also from within a code fence.

    Args:
        text: Any text.

    Raises:
        ValueError: It is no JSON.
    """
    fenced = _FENCE.search(text)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_float=Decimal, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError("nested too deeply")


def parse_reference(text: str) -> Any:
    """Reads a target as JSON.

    Args:
        text: A reference.

    Raises:
        DataError: It is no JSON.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(
            f"the target {text[:80]!r} is no JSON ({error}), which field_f1 and json_similarity compare; take other"
            " evaluation.metrics, or write targets as JSON"
        ) from None


def fields(value: Any, clean: Clean, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Hashable]]:
    """Walks over the fields of a record.

    Args:
        value: Parsed JSON.
        clean: Normalisation of texts.
        path: Keys above.

    Yields:
        Pairs of a path and a comparable value.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            yield from fields(item, clean, (*path, key))
    elif isinstance(value, list):
        for item in value:
            yield from fields(item, clean, path)
    elif value is not None and not (isinstance(value, str) and not value.strip()):
        yield path, comparable(value, clean)


def comparable(value: Any, clean: Clean) -> Hashable:
    """Makes equal what means the same: ``"1,234.50"`` and 1234.5, ``"01.03.2024"`` and ``"2024-03-01"``.

    A text with leading zeros is a name, not a number. Where ``1,234`` could be either, the comma parts thousands.

    Args:
        value: A value without others in it.
        clean: Normalisation of texts.
    """
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, int | Decimal):
        return "number", Decimal(value)
    text = value.strip()
    number = _number(text)
    if number is not None:
        return "number", number
    date = parse_date(text)
    if date is not None:
        return "date", date
    return "text", clean(value)


def _number(text: str) -> Decimal | None:
    plain = None
    if _POINT_DECIMAL.fullmatch(text):
        plain = text.replace(",", "")
    elif _COMMA_DECIMAL.fullmatch(text):
        plain = text.replace(".", "").replace(",", ".")
    if plain is None or _LEADING_ZERO.match(plain):
        return None
    return Decimal(plain)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
