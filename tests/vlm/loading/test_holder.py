"""One live model at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from vlm.loading import holder


class Stub:
    """Stands for a loaded model; the holder looks at none of its fields."""


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    holder.release()
    yield
    holder.release()


def hold(key: str, log: list[str], before: Any = None) -> Any:
    def build() -> Any:
        log.append(key)
        if before is not None:
            before()
        return Stub()

    return holder.hold(key, build)


def test_the_same_key_builds_once() -> None:
    log: list[str] = []
    first = hold("a", log)
    assert hold("a", log) is first
    assert log == ["a"]


def test_the_previous_model_is_gone_before_the_next_is_built() -> None:
    log: list[str] = []
    first = weakref.ref(hold("a", log))
    assert first() is not None
    alive: list[bool] = []
    hold("b", log, before=lambda: alive.append(first() is not None))
    assert alive == [False]
    assert log == ["a", "b"]
    hold("a", log)
    assert log == ["a", "b", "a"]


def test_release_frees_and_a_failed_build_holds_nothing() -> None:
    log: list[str] = []
    first = weakref.ref(hold("a", log))
    holder.release()
    assert first() is None

    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        hold("a", log, before=fail)
    hold("a", log)
    assert log == ["a", "a", "a"]
