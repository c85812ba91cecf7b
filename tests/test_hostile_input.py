"""Readers of what others wrote take any bytes, or refuse them in the way that they promise.

Good input with a few changes, a few hundred times; `benchmarks/fuzz.py` does the same for hours.
"""

from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.hostile import Target, targets

NAMES = (
    "image", "video", "jsonl", "jsonl_gz", "csv", "parquet", "arrow", "settings", "store", "resealed", "weights",
)  # fmt: skip
PIECES = st.one_of(
    st.binary(min_size=1, max_size=6),
    st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"[" * 2000, b'{"a":' * 500, b"1e999", b"NaN", b'"\\ud800"', b"../", b"&a ", b"*a "]),
)  # fmt: skip
CHANGES = st.lists(
    st.tuples(st.sampled_from(["replace", "insert", "cut", "double"]), st.floats(0, 1), PIECES), max_size=4
)


def changed(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, piece in changes:
        place = int(where * len(data))
        if kind == "replace":
            data = data[:place] + piece + data[place + len(piece) :]
        elif kind == "insert":
            data = data[:place] + piece + data[place:]
        elif kind == "cut":
            data = data[:place]
        else:
            data = data[:place] + data[place // 2 :]
    return data


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("hostile"))


def test_all_targets_are_here(reading: dict[str, Target]) -> None:
    assert set(NAMES) == set(reading)


@pytest.mark.parametrize("name", NAMES)
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_broken_input_is_refused_as_promised(reading: dict[str, Target], name: str, data: st.DataObject) -> None:
    target = reading[name]
    changes = data.draw(CHANGES)
    if name == "settings":  # a tenth of a second each for depths that have a test of their own
        changes = [(kind, where, piece[:100]) for kind, where, piece in changes]
    broken = changed(data.draw(st.sampled_from(target.seeds)), changes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # as preparation does
        target.run(broken)


@pytest.mark.parametrize("name", NAMES)
def test_files_cut_anywhere(reading: dict[str, Target], name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for seed in reading[name].seeds:
            for place in range(0, len(seed), max(1, len(seed) // 25)):
                reading[name].run(seed[:place])
