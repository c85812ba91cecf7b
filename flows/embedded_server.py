"""Prefect's embedded server, for runs on the command line: Ctrl-C spares it, and it never outlives its flow.

A terminal sends Ctrl-C to all processes of its group. The server would end at once, before the flow has told it how the
run ended, and the flow's client would try to reach it for a minute. So the server starts with SIGINT blocked, which a
process inherits, and which handlers that it installs itself do not undo; the flow ends it on its way out.

A flow that is killed has no way out. So a small process watches a pipe whose other end only the flow holds, and ends the
server when that is closed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# A descriptor of the process, not its number, which another process could have got meanwhile.
_WATCH = """
import os, signal, sys
server = os.pidfd_open(int(sys.argv[1]))
sys.stdin.buffer.read()
try:
    signal.pidfd_send_signal(server, signal.SIGTERM)
except ProcessLookupError:
    pass
"""


def keep_server_apart() -> None:
    """Has the embedded server of this process start apart from it; does nothing where a server is set up. Loads Prefect."""
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value() is not None:
        return
    from prefect.server.api.server import SubprocessASGIServer

    class Apart(SubprocessASGIServer):
        """The server of this process: Prefect's clients ask for the one without a port, and get the first one made."""

        def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
            with _interrupts_blocked():
                server = super()._run_uvicorn_command()
            _watch(server)
            return server

    Apart()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch(server: subprocess.Popen[Any]) -> None:
    if not hasattr(os, "pidfd_open"):  # Linux has it
        return
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCH, str(server.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    # This keeps the pipe open to the end of the process, whatever the end is.
    threading.Thread(target=watcher.wait, name="embedded-server-watcher", daemon=True).start()
