"""Stopping at a step boundary when the process is asked to end."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


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
    """Catches SIGTERM for the length of a ``with`` block and remembers it; a block that ends well all the same passes it on.

    Signals reach the main thread only; in any other thread the block changes nothing.

    Attributes:
        signum: The signal that came, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._installed = False
        self._previous: object = None

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._remember)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            # A handler that was not set from Python reads as None and cannot be put back.
            signal.signal(signal.SIGTERM, self._previous if self._previous is not None else signal.SIG_DFL)  # type: ignore[arg-type]
            self._installed = False
        if self.signum is not None and kind is None:
            # It came too late for the block to act on it; whoever handled it before shall do so now.
            signal.raise_signal(self.signum)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
