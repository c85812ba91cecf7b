"""Prefect's embedded server, for runs on the command line: signals spare it, and it never outlives its flow.

A terminal sends Ctrl-C to all processes of its group, Slurm and systemd send SIGTERM to all processes of a job or service. The
server would end at once, before the flow has told it how the run ended, and the flow's client would try to reach it for a
minute. So the server starts with both signals blocked, which a process inherits, and which handlers that it installs
itself do not undo.

It ends with a pipe whose other end only the flow holds: when the flow closes it on its way out, or has been killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from vlm.processes import signals

# The thread alone takes the signal, also one that was sent before. Handlers run in the main thread as ever, but nothing wakes
# it: it has to look up now and then, as uvicorn does ten times per second.
END_WITH_THE_FLOW = """
import os, signal, threading
def end():
    while os.read(0, 1):
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end, daemon=True).start()
"""
_SERVER = (
    END_WITH_THE_FLOW
    + """
import uvicorn
uvicorn.main()
"""
)


def keep_server_apart() -> None:
    """Has the embedded server of this process start apart from it; does nothing where a server is set up. Loads Prefect."""
    from prefect.settings import PREFECT_API_URL, get_current_settings

    if PREFECT_API_URL.value() is not None:
        return
    from prefect.server.api.server import SubprocessASGIServer

    class Apart(SubprocessASGIServer):
        """The server of this process: Prefect's clients ask for the one without a port, and get the first one made."""

        def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
            # As Prefect's own, which leaves no room for the pipe.
            arguments = [
                "--factory",
                "prefect.server.api.server:create_app",
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
            ]
            environment = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
            environment |= get_current_settings().to_environment_variables(exclude_unset=True)
            return start_apart(_SERVER, *arguments, "--log-level", "error", "--lifespan", "on", **environment)

        def stop(self) -> None:
            if self.server_process is not None and self.server_process.stdin is not None:
                self.server_process.stdin.close()
            super().stop()

    Apart()


def start_apart(code: str, *arguments: str, **environment: str) -> subprocess.Popen[Any]:
    """Starts a Python process that only the end of its input ends.

    Args:
        code: What it runs; begins with `END_WITH_THE_FLOW`.
        arguments: Its command line.
        environment: Variables besides those of this process.
    """
    with signals.blocked():
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, env=os.environ | environment
        )
