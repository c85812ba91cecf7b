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
        self._began: float | None = None
        self._durations: deque[float] = deque(maxlen=_NUM_REMEMBERED)
        threading.Thread(target=self._look, daemon=True).start()

    @contextmanager
    def step(self) -> Iterator[None]:
        """The part of a step in which processes wait for each other."""
        began = time.monotonic()
        with self._lock:
            self._began = began
        try:
            yield
        finally:
            with self._lock:
                self._began = None
            self._durations.append(time.monotonic() - began)

    def _look(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            with self._lock:
                taken = 0.0 if self._began is None else time.monotonic() - self._began
            if self._durations and taken > self._timeout_seconds + _SLOWER * max(self._durations):
                self._on_late(taken)
                return
