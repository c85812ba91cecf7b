"""Signals to a process and all that came of it, as Slurm sends them to those of a job."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Numbers of the processes that a process, or one of those, has started."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


def signal_all(signum: signal.Signals) -> None:
    """Sends this process and all that it has started a signal."""
    for pid in [*descendants(os.getpid()), os.getpid()]:
        os.kill(pid, signum)
