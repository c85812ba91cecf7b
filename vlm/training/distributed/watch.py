"""Notices that a step hangs, wherever it does. No torch.

A process that waits for another one in a sum between GPUs waits on the device, and its host at the next value that it reads from
there: no call of its own returns, so none can time out. A thread beside it looks at the clock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOOK_SECONDS = 1.0
# How much longer than the longest of some steps before it one may take by itself: with smaller packs after memory ran out, say.
_SLOWER, _NUM_REMEMBERED = 2.0, 16


class StepWatch:
    """Calls for help when a step takes much longer than those before it. The first one, in which kernels are compiled, may.

    Args:
        timeout_seconds: How long others may keep it waiting.
        on_late: Called once, in a thread of its own, with how many seconds the step has taken.
    """

    def __init__(self, timeout_seconds: float, on_late: Callable[[float], None]) -> None:
        self._timeout_seconds, self._on_late = timeout_seconds, on_late
        self._lock = threading.Lock()
        # Of the step at hand; None between steps.
        self._taken_seconds: float | None = None
        self._durations: deque[float] = deque(maxlen=_NUM_REMEMBERED)
        threading.Thread(target=self._look, daemon=True).start()

    @contextmanager
    def step(self) -> Iterator[None]:
        """The part of a step in which processes wait for each other."""
        began = time.monotonic()
        with self._lock:
            self._taken_seconds = 0.0
        try:
            yield
        finally:
            with self._lock:
                self._taken_seconds = None
                self._durations.append(time.monotonic() - began)

    def _look(self) -> None:
        looked = time.monotonic()
        while True:
            time.sleep(_LOOK_SECONDS)
            # A job that was suspended as a whole, and goes on, is not late.
            seconds, looked = min(time.monotonic() - looked, 2 * _LOOK_SECONDS), time.monotonic()
            with self._lock:
                if self._taken_seconds is None:
                    continue
                self._taken_seconds = taken = self._taken_seconds + seconds
                longest = max(self._durations, default=None)
            if longest is not None and taken > self._timeout_seconds + _SLOWER * longest:
                self._on_late(taken)
                return
