"""Canonical JSON, keys, and what changed between two of them."""

from __future__ import annotations

import enum
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts import UnhashableError, canonical_digest, canonical_json, diff_documents, step_key

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)
DOCUMENT = {
    "unit": "configure_lora",
    "version": 1,
    "code": "c" * 64,
    "config": {"lora": {"rank": 16, "alpha": 16.0, "targets": ["q", "v"], "pattern": {"a": 4}}},
    "inputs": {"checkpoint": "ab12" * 16},
    "sources": {"/data/a.parquet": "11" * 32},
}


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: shuffled(value[name]) for name in reversed(list(value))}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(PLAIN)
def test_order_does_not_count_and_json_changes_nothing(value: Any):
    text = canonical_json(value)
    assert canonical_json(shuffled(value)) == text
    assert canonical_json(json.loads(json.dumps(value))) == text
    assert canonical_json(json.loads(text)) == text


@given(PLAIN, PLAIN)
def test_different_values_have_different_digests(one: Any, other: Any):
    # json tells True from 1 but not 1.0 from 1, which is the equality that canonical JSON promises
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
        if isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, (int, float)) and isinstance(b, (int, float)):
            exact = max(abs(a), abs(b)) < 2**53
            return isinstance(a, bool) == isinstance(b, bool) and a == b and (exact or type(a) is type(b))
        return type(a) is type(b) and a == b

    assert (canonical_digest(one) == canonical_digest(other)) == same(one, other)


class Colour(enum.StrEnum):
    RED = "red"


class Number(int):
    pass


@given(
    PLAIN,
    st.sampled_from(
        [
            math.nan,
            math.inf,
            -math.inf,
            b"bytes",
            {1, 2},
            Path("x"),
            1j,
            object(),
            len,
            Colour.RED,
            Number(3),
            "\ud800",
            {1: 2},
        ]
    ),
)
def test_what_cannot_be_hashed_raises_with_its_path(beside: Any, bad: Any):
    with pytest.raises(UnhashableError, match=r"^config\.list\[1\]\.here: "):
        canonical_json({"config": {"list": [beside, {"here": bad}], "other": beside}})


def test_a_value_that_contains_itself_raises():
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UnhashableError, match="contains itself"):
        canonical_json({"config": loop})


def test_the_canonical_form_is_fixed():
    # Changing it would silently make every earlier result a miss.
    value = {"b": [1, 2.0, -0.0, 0.1, 1e300, True, None], "a": {"é\n": (1.5,)}, "B": 2.0**60}
    assert canonical_json(value) == '{"B":1.152921504606847e+18,"a":{"é\\n":[1.5]},"b":[1,2,0,0.1,1e+300,true,null]}'
    assert step_key(DOCUMENT) == "6bda59ac2fa05bf3192dd1290a76a31c64341b801d80d3d141b86c3a1187d1b9"


def test_a_key_needs_exactly_the_document_fields():
    with pytest.raises(UnhashableError, match=r"'sources' is missing; 'extra' is unknown"):
        step_key({**{name: DOCUMENT[name] for name in DOCUMENT if name != "sources"}, "extra": 1})
    with pytest.raises(UnhashableError, match=r"config\.x: .* is not a finite number"):
        step_key({**DOCUMENT, "config": {"x": math.nan}})
    assert step_key(DOCUMENT) == step_key(shuffled(DOCUMENT))
    assert step_key(DOCUMENT) != step_key({**DOCUMENT, "version": 2})


def changed(**fields: Any) -> list[str]:
    return diff_documents(DOCUMENT, {**DOCUMENT, **fields})


def lora(**fields: Any) -> dict[str, Any]:
    return {"lora": {**DOCUMENT["config"]["lora"], **fields}}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"config": lora(rank=32)}, "config.lora.rank: 16 → 32"),
        ({"config": lora(targets=["q", "k"])}, "config.lora.targets[1]: 'v' → 'k'"),
        ({"config": lora(targets=["q"])}, "config.lora.targets: ['q', 'v'] → ['q']"),
        ({"config": lora(dora=True)}, "config.lora.dora: added (True)"),
        ({"config": lora(pattern={})}, "config.lora.pattern.a: removed (was 4)"),
        ({"config": lora(pattern=None)}, "config.lora.pattern: {'a': 4} → None"),
        ({"inputs": {"checkpoint": "cd34" * 16}}, "inputs.checkpoint: ab12… → cd34…"),
        ({"code": "d" * 64}, "code: the step's code changed"),
        ({"code": {"vlm.lora": "d" * 64}}, "code: the step's code changed"),
        ({"version": 2}, "version: 1 → 2"),
        ({"sources": {"/data/a.parquet": "22" * 32}}, "sources./data/a.parquet: content changed"),
        ({"sources": {}}, "sources./data/a.parquet: removed (was 1111…)"),
    ],
)
def test_a_change_is_described_by_one_readable_line(fields: dict[str, Any], line: str):
    assert changed(**fields) == [line]


def test_equal_documents_have_no_changes_and_long_values_are_cut():
    assert changed() == []
    assert changed(config=lora(alpha=16)) == [], "16 and 16.0 have the same key"
    (line,) = changed(config=lora(note="x" * 500))
    assert len(line) < 100
    assert len(changed(version=2, code="d", config=lora(rank=1, alpha=2))) == 4


@given(PLAIN, PLAIN)
def test_there_are_changes_exactly_if_the_digests_differ(one: Any, other: Any):
    old, new = {"config": one}, {"config": other}
    assert bool(diff_documents(old, new)) == (canonical_digest(old) != canonical_digest(new))
