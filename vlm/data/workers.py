"""More cores for long preparations: processes beside the threads, once there is enough work to be worth their start.

Decoding and resizing run outside Python's lock, so threads do for large images. Small ones spend their time in Python (templates,
tokens, checks), where threads take turns. A process of its own needs seconds to import the tokenizer, hence threads work alone at
first and hand over as processes become ready. What a row becomes is the same either way.

A process is started by module name with pipes, not by `multiprocessing`, which would import the main program again (a flow, a
notebook, a script without a guard).
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from vlm.data.images import pillow_limit_off
from vlm.data.rows import Outcome
from vlm.data.sample import Job, SampleMaker
from vlm.errors import ResourceError

# About what starting a process costs, so waiting costs at most twice the best choice.
START_AFTER_SECONDS = 20.0
# Threads that keep this share of the cores busy leave nothing to gain.
BUSY_SHARE = 0.75
_log = logging.getLogger(__name__)


class Workers:
    """Prepares chunks of rows; call it from as many threads as there are workers.

    Args:
        maker: Prepares one row.
        num_workers: Processes to start at most.
        may_start: Whether processes can read what the rows name (not what lies in this process's memory).
    """

    def __init__(self, maker: SampleMaker, num_workers: int, *, may_start: bool) -> None:
        self._maker = maker
        self._num_workers = num_workers
        self._ready: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._processes: list[_Process] = []
        self._starter: threading.Thread | None = None
        self._may_start = may_start and num_workers > 1
        self._begin = time.monotonic()
        self._begin_cpu = time.process_time()
        self.num_rows_in_processes = 0

    def __call__(self, chunk: list[Job]) -> list[Outcome]:
        """Prepares rows in a process if one is ready, else in the calling thread."""
        try:
            process = self._ready.get_nowait()
        except queue.Empty:
            return [self._maker(job) for job in chunk]
        outcomes = process.prepare(chunk)
        self._ready.put(process)
        self.num_rows_in_processes += len(chunk)
        return outcomes

    def start_if_worthwhile(self) -> None:
        """Starts the processes in the background once the work has lasted long enough and threads get in each other's way."""
        elapsed = time.monotonic() - self._begin
        if not self._may_start or self._starter is not None or elapsed < START_AFTER_SECONDS:
            return
        cores = min(self._num_workers, os.cpu_count() or 1)
        if time.process_time() - self._begin_cpu < BUSY_SHARE * cores * elapsed:
            try:
                packed = pickle.dumps(self._maker)
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                _log.info("preparing in threads only: %s", error)
                self._may_start = False
                return
            self._processes = [_Process() for _ in range(self._num_workers)]
            self._starter = threading.Thread(
                target=self._await_ready, args=(packed,), name="prepare-starter", daemon=True
            )
            self._starter.start()

    def _await_ready(self, packed: bytes) -> None:
        for process in self._processes:
            process.send(packed)
        for process in self._processes:
            if process.is_ready():
                self._ready.put(process)
            else:
                _log.warning("a preparation process did not start; its share is done in threads")

    def close(self) -> None:
        """Ends all processes."""
        for process in self._processes:
            process.kill()
        if self._starter is not None:
            self._starter.join()  # it reads from the pipes, so they are closed after it
        for process in self._processes:
            process.close()


class _Process:
    """One worker process and the pipes to it."""

    def __init__(self) -> None:
        # The parent's search path, so that the same packages are found however the parent was started.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "vlm.data.workers"]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._to = Connection(os.dup(self._popen.stdin.fileno()), readable=False)
        self._from = Connection(os.dup(self._popen.stdout.fileno()), writable=False)
        self._popen.stdin.close()
        self._popen.stdout.close()

    def send(self, packed: bytes) -> None:
        """Hands over the row maker."""
        try:
            self._to.send_bytes(packed)
        except OSError:
            return  # it ended; is_ready says so

    def is_ready(self) -> bool:
        """Waits until the process can take rows; False if it ended instead."""
        try:
            return self._from.recv_bytes() == b"ready"
        except (EOFError, OSError):
            return False

    def prepare(self, chunk: list[Job]) -> list[Outcome]:
        """Prepares rows there.

        Raises:
            ResourceError: If the process died.
            RuntimeError: If it met a bug, with its traceback.
        """
        try:
            self._to.send(chunk)
            answer: Any = self._from.recv()
        except (EOFError, OSError) as error:
            code = self._popen.wait()
            raise ResourceError(
                f"a preparation process died (exit code {code}) on rows {chunk[0].row_number} to {chunk[-1].row_number}. "
                "It probably ran out of memory: lower runtime.num_workers or data.max_source_pixels."
            ) from error
        if isinstance(answer, str):
            raise RuntimeError(f"a preparation process failed:\n{answer}")
        outcomes: list[Outcome] = answer
        return outcomes

    def kill(self) -> None:
        """Ends the process, whatever it is doing."""
        self._popen.kill()
        self._popen.wait()

    def close(self) -> None:
        """Closes the pipes."""
        self._to.close()
        self._from.close()


def main() -> None:
    """What a worker process does until its pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches the parent, which ends this process
    answers = Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # nothing that is printed may get between the answers
    jobs = Connection(os.dup(0), writable=False)
    try:
        # From the parent only, through a pipe that nobody else can write to.
        maker: SampleMaker = pickle.loads(jobs.recv_bytes())  # noqa: S301
        answers.send_bytes(b"ready")
        with pillow_limit_off():
            while True:
                chunk: list[Job] = jobs.recv()
                try:
                    answers.send([maker(job) for job in chunk])
                except Exception:
                    # Not swallowed: the parent raises it.
                    answers.send(traceback.format_exc())
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
