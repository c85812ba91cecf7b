"""What every started process does besides its work: it sees one GPU, tells of its errors, and hears whoever started it. No torch."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from vlm.processes.events import EventWriter, events_file

# What tells libraries that they run among several processes: each would make arrangements of its own.
_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")


def run_worker(
    events_dir: Path,
    device: str,
    work: Callable[[EventWriter], None],
    *,
    interrupted: Callable[[BaseException], bool] = lambda error: False,
) -> None:
    """Runs a process's work; an error is told and ends the process at once.

    Args:
        events_dir: Where it tells of what happens.
        device: ``cpu`` or ``cuda``. The process sees one GPU only, as one that works alone does.
        work: Does it.
        interrupted: Whether what was raised is no error, but the end that was asked for.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            str(local_rank) if visible is None else visible.split(",")[local_rank].strip()
        )
    events = EventWriter(events_file(events_dir, local_rank))
    logging.getLogger("vlm").addHandler(events)
    try:
        work(events)
        events.tell({"done": True})
    except BaseException as error:
        if interrupted(error):
            events.tell({"done": True})
            return
        fail(events, error)


def fail(events: EventWriter, error: BaseException) -> NoReturn:
    """Tells of an error and ends this process at once.

    Args:
        events: Where it is told.
        error: What happened.
    """
    trace = "".join(traceback.format_exception(error))
    events.tell({"error": type(error).__name__, "message": str(error), "trace": trace})
    sys.stdout.flush()
    sys.stderr.flush()
    # Others may be gone, and an orderly end would wait for them.
    os._exit(1)


def listen(asked_to_stop: Callable[[], None]) -> None:
    """Hears whoever started this process, from now on: a byte asks for a stop, the end of the stream means that it is gone.

    Args:
        asked_to_stop: Called in a thread of its own.
    """

    def hear() -> None:
        while os.read(0, 1):
            asked_to_stop()
        os._exit(1)

    threading.Thread(target=hear, daemon=True).start()


def forget_others() -> None:
    """Removes what tells libraries that there are several processes."""
    for name in _LAUNCH_VARIABLES:
        os.environ.pop(name, None)


def share_cores(num_processes: int) -> int:
    """Threads for one of several processes that compute on this machine's cores.

    Args:
        num_processes: Of this machine.
    """
    return max(1, len(os.sched_getaffinity(0)) // num_processes)
