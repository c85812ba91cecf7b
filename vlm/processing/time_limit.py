"""Bounds the time of foreign code that runs in Python, such as a chat template: its sandbox keeps it from files, not from loops.

A thread cannot be ended from outside. So the work runs in a thread of its own that nobody waits for beyond the limit, nor at
the end of the process; the error that is raised then is meant to end the process.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")


class _Worker(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="time-limit", daemon=True)
        self.inbox: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[tuple[Any, BaseException | None]]]] = (
            queue.SimpleQueue()
        )
        self.start()

    def run(self) -> None:
        while True:
            work, reply = self.inbox.get()
            try:
                reply.put((work(), None))
            except BaseException as error:
                reply.put((None, error))


_idle: list[_Worker] = []
os.register_at_fork(after_in_child=_idle.clear)  # threads do not survive a fork


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
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
    reply: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    worker.inbox.put((work, reply))
    try:
        result, error = reply.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"over {seconds:g} seconds") from None
    _idle.append(worker)
    if error is not None:
        raise error
    found: R = result
    return found
