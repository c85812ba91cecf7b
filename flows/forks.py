"""Processes forked from a flow, such as those of a data loader, end well.

Prefect's services run in threads, which a fork leaves behind, and would be drained by every process at its end. A forked
one fails at that, silently and with exit status 1, for which PyTorch's data loader breaks off the training.
"""

from __future__ import annotations

import os
import threading


def leave_services_behind() -> None:
    """Has forked processes forget what Prefect's services, whose threads they do not have, would do at the end."""
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    # Private, but there is no other way to take back what was registered.
    callbacks = getattr(threading, "_threading_atexits", [])
    callbacks[:] = [callback for callback in callbacks if not _belongs_to_prefect(callback)]


def _belongs_to_prefect(callback: object) -> bool:
    owner = getattr(getattr(callback, "func", callback), "__self__", None)
    return type(owner).__module__.split(".", 1)[0] == "prefect"
