"""Prefect's server beside a run on the command line, with a process that stands for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
# Says when it is asked to end, and how; as a server does, it sets its own handlers.
SERVER = """
import signal, sys, time
def end(signum, frame):
    print(signal.Signals(signum).name, flush=True)
    sys.exit()
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""
FLOW = """
import subprocess, sys, time
from flows.embedded_server import _interrupts_blocked, _watch
with _interrupts_blocked():
    server = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
_watch(server)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux can watch a process without a race")
def test_the_server_is_spared_by_ctrl_c_and_ends_with_a_killed_flow() -> None:
    flow = subprocess.Popen(
        [sys.executable, "-c", FLOW, SERVER], cwd=PROJECT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert flow.stdout is not None
    assert flow.stdout.readline() == "ready\n"
    os.killpg(flow.pid, signal.SIGINT)  # as a terminal does
    assert flow.stdout.readline() == "interrupted\n"
    flow.kill()
    # The pipe ends when the server, which has inherited it, is gone.
    assert flow.stdout.read() == "SIGTERM\n"
    flow.wait()
    flow.stdout.close()
