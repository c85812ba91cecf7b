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
while True:
    time.sleep(0.1)
"""
FLOW = """
import signal, sys, time
from flows.embedded_server import END_WITH_THE_FLOW, start_apart
def tell(signum, frame):
    print("flow", signal.Signals(signum).name, flush=True)
signal.signal(signal.SIGINT, tell)
signal.signal(signal.SIGTERM, tell)
server = start_apart(END_WITH_THE_FLOW + sys.argv[1])
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="only POSIX blocks signals")
def test_the_server_is_spared_by_signals_to_all_processes_and_ends_with_a_killed_flow() -> None:
    flow = subprocess.Popen(
        [sys.executable, "-c", FLOW, SERVER], cwd=PROJECT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert flow.stdout is not None
    assert flow.stdout.readline() == "ready\n"
    os.killpg(flow.pid, signal.SIGINT)  # as a terminal does
    assert flow.stdout.readline() == "flow SIGINT\n"
    os.killpg(flow.pid, signal.SIGTERM)  # as Slurm and systemd do
    assert flow.stdout.readline() == "flow SIGTERM\n"
    flow.kill()
    # The pipe ends when the server, which has inherited it, is gone; the signal that it spared itself ends it now, in order.
    assert flow.stdout.read() == "SIGTERM\n"
    flow.wait()
    flow.stdout.close()
