"""Signals that go to all processes of a run at once, as Slurm, systemd and terminals send them. No torch.

They are for the flow's process to act on. What it starts begins with them blocked, which is inherited, so that they never
come too early for a handler. Processes that make batches for another one leave them to it altogether: a data loader whose
worker is gone would break the training off before its checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
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


_is_left_to_parent = False


def leave_to_parent() -> None:
    """Has this process, which works for its parent alone, end when that one sends SIGTERM, and ignore what others send.

    Once per process, in its main thread, before others are there.
    """
    global _is_left_to_parent
    if _is_left_to_parent:
        return
    _is_left_to_parent = True
    # Not by a handler: it does not learn who sent a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, _TO_ALL)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
