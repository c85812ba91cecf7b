"""What all tasks share: how a shell becomes a Prefect task, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from tasks.session import Session, UnitResult

P = ParamSpec("P")
R = TypeVar("R")


def step(function: Callable[P, R]) -> Task[P, R]:
    """Makes a Prefect task of a step, which has the function's name.

    Prefect neither caches nor persists: its own cache would answer although an artifact is corrupt or gone. The store
    decides, and a step whose artifacts are all there ends in a state named Cached.
    """
    return named_step(function.__name__)(function)


def named_step(name: str) -> Callable[[Callable[P, R]], Task[P, R]]:
    """As ``step``, where another function does a step of that name.

    Args:
        name: Of the step.
    """

    def decorate(function: Callable[P, R]) -> Task[P, R]:
        return task(
            name=name,
            description=(function.__doc__ or "").split("\n", 1)[0],
            cache_policy=NO_CACHE,
            persist_result=False,
        )(function)

    return decorate


def finish(session: Session, step_name: str, value: Any) -> Any:
    """Ends a step: as Cached when all of its units were, otherwise as Completed, with the digests as message.

    Args:
        session: The run.
        step_name: The step that ends.
        value: What the task gives to its caller.
    """
    results = [result for name, result in session.results.items() if name.split(".", 1)[0] == step_name]
    message = ", ".join(_describe(result) for result in results)
    state: State[Any]
    if all(result.cached for result in results):
        state = Completed(name="Cached", message=message, data=value)
    else:
        state = Completed(message=message, data=value)
    return state


def _describe(result: UnitResult) -> str:
    return ", ".join(f"{name} {ref.digest[:12]}" for name, ref in result.outputs.items())
