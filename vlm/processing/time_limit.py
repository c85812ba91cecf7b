"""Bounds the time of foreign code that runs in Python, such as a chat template: its sandbox keeps it from files, not from loops.

A thread cannot be ended from outside. So the work runs in a thread of its own that nobody waits for beyond the limit, nor at
the end of the process; the error that is raised then is meant to end the process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")


def within(seconds: float, work: Callable[[], R]) -> R:
    """Runs some work in another thread and waits for it.

    Args:
        seconds: How long.
        work: Without arguments.

    Returns:
        What it returns; what it raises is raised here.

    Raises:
        TimeoutError: It takes longer.
    """
    reply: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            reply.put((work(), None))
        except BaseException as error:
            reply.put((None, error))

    thread = threading.Thread(target=run, name="time-limit", daemon=True)
    thread.start()
    try:
        result, error = reply.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"over {seconds:g} seconds") from None
    thread.join()
    if error is not None:
        raise error
    found: R = result
    return found
