"""Signals that go to all processes of a run at once, as Slurm, systemd and terminals send them. No torch.

They are for the flow's process to act on. What it starts begins with them blocked, which is inherited, so that they never
come too early for a handler.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

# Has the launcher end its processes at once; none that is sent to all.
END_SIGNAL = signal.SIGUSR2
_TO_ALL = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def blocked() -> Iterator[None]:
    """Has processes that are started meanwhile begin with these signals blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """Forgets those that came while they were blocked, and ignores all others, as do processes started from now on."""
    for signum in _TO_ALL:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_ALL)
