"""Stopping at a step boundary when the process is asked to end."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class TrainingInterrupted(BaseException):
    """The process was asked to end; the training stands in a checkpoint and goes on from there when run again.

    Not an `Exception`, like `KeyboardInterrupt`: nothing that handles errors should take a stop for one. Whoever catches
    it ends the process, or raises the signal again now that the former handler is back.

    Args:
        step: The last finished step.
        signum: The signal.
    """

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(
            f"interrupted by {signal.Signals(signum).name} after step {step}; run again to resume from there"
        )
        self.step = step
        self.signum = signum


class StopFlag:
    """Catches SIGTERM and Ctrl-C for the length of a ``with`` block and remembers them.

    A block that ends well all the same passes the signal on. A second Ctrl-C does not wait for the block.

    Signals reach the main thread only; in any other thread the block changes nothing.

    Attributes:
        signum: The signal that came, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self.signum is not None and kind is None:
            # It came too late for the block to act on it; whoever handled it before shall do so now.
            signal.raise_signal(self.signum)

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            # A handler that was not set from Python reads as None and cannot be put back.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if signum == self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
