"""Has several processes do a piece of work: starts them, listens, and says what went wrong. No torch."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import vlm
import vlm.errors
from vlm.errors import ResourceError, VlmError
from vlm.processes import signals
from vlm.processes.events import Event, EventReader, events_file
from vlm.processes.plan import Launch, read_failures

_LAUNCHER = "vlm.processes.launcher"
# Names of errors of processes that lost another one, or waited too long for it.
_LOST, _HUNG = "LostProcessError", "HungProcessError"
_POLL_SECONDS = 0.1
# From the first error to the end of processes that do not end by themselves.
_GRACE_SECONDS = 6
# The launcher ends its processes meanwhile.
_SHUTDOWN_SECONDS = 40
_LOG_LINES = 15


@dataclass
class _Process:
    """What is known of one process of this machine."""

    reader: EventReader
    pid: int | None = None
    last_step: int | None = None
    error: Event | None = None
    is_done: bool = False
    silent_seconds: float = 0.0

    def listen_for_life(self, seconds: float, launch: Launch, number: int) -> None:
        """Counts how long nothing was heard of it, and takes it for hung at some point.

        Args:
            seconds: Since the last time.
            launch: Says how long that is.
            number: Of the process on this machine.
        """
        self.silent_seconds = 0.0 if self.reader.is_alive() else self.silent_seconds + seconds
        waited_for = self.pid is not None and self.error is None and not self.is_done
        if waited_for and self.silent_seconds > launch.silent_seconds:
            self.error = {
                "error": _HUNG,
                "message": f"process {number} of machine {launch.machine_rank} gave no sign of life for"
                f" {launch.silent_seconds:g} s; was it stopped, or is this machine out of memory? Run again to go on from what is"
                " done",
            }
            _kill(self, launch.worker)


def run_processes(
    launch: Launch, take: Callable[[int, Event], None], should_stop: Callable[[], bool] = lambda: False
) -> None:
    """Runs processes to their end; none outlives this call.

    This process must have let go of its own model: the others take the GPUs.

    Args:
        launch: What to start. Its folder is there.
        take: Called with the number of a process of this machine and what it tells, other than warnings and errors.
        should_stop: Asked now and then; once it says yes, the processes are asked to stop in order. Where none has begun, as
            while machines wait for each other, this call returns at once, and `take` was never called.

    Raises:
        VlmError: What a process ended with, or that it was killed or hung.
    """
    processes = [_Process(EventReader(events_file(launch.events_dir, local))) for local in range(launch.num_processes)]

    def listen() -> None:
        for number, process in enumerate(processes):
            for event in process.reader.new():
                if "error" in event:
                    process.error = event
                elif "warning" in event:
                    logging.getLogger(__name__).warning("%s", event["warning"])
                else:
                    process.pid = event.get("pid", process.pid)
                    process.is_done = process.is_done or "done" in event
                    process.last_step = event.get("step", process.last_step)
                    take(number, event)

    path = launch.events_dir / "launch.json"
    launch.write(path)
    with _launched(path, launch.events_dir) as (launcher, ask_to_stop):
        failed_at, polled = math.inf, time.monotonic()
        try:
            while launcher.poll() is None:
                listen()
                # After a long sleep of the whole machine, all get a chance to be heard.
                seconds, polled = min(time.monotonic() - polled, 1.0), time.monotonic()
                for number, process in enumerate(processes):
                    process.listen_for_life(seconds, launch, number)
                if should_stop():
                    if all(process.pid is None for process in processes):
                        return
                    ask_to_stop()
                if any(process.error for process in processes):
                    failed_at = min(failed_at, time.monotonic())
                if time.monotonic() - failed_at > _GRACE_SECONDS:
                    for process in processes:
                        _kill(process, launch.worker)
                time.sleep(_POLL_SECONDS)
        finally:
            listen()
        if launcher.returncode != 0:
            raise _failure(launch, processes, launcher.returncode)


def _kill(process: _Process, worker: str) -> None:
    """Ends a process that hangs: torch's launcher would wait for half a minute before it does."""
    if process.pid is None:
        return
    with suppress(OSError):
        # The number may belong to another one by now.
        if worker.encode() in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            os.kill(process.pid, signal.SIGKILL)


@contextmanager
def _launched(path: Path, events_dir: Path) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], None]]]:
    """The launcher while it runs, and how to ask its processes to stop."""
    root = str(Path(next(iter(vlm.__path__))).parent)
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with (events_dir / "launcher.log").open("wb") as log, signals.blocked():
        launcher = subprocess.Popen(
            [sys.executable, "-m", _LAUNCHER, str(path)],
            # All processes inherit it: what is written reaches one of them, and its end all.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C goes to all processes of a terminal's group; here it is for this process to tell them.
            start_new_session=True,
        )
    said = False

    def ask_to_stop() -> None:
        nonlocal said
        assert launcher.stdin is not None
        if not said:
            said = True
            with suppress(BrokenPipeError):
                launcher.stdin.write(b"s")
                launcher.stdin.flush()

    try:
        yield launcher, ask_to_stop
    finally:
        assert launcher.stdin is not None
        with suppress(BrokenPipeError):
            launcher.stdin.close()
        if launcher.poll() is None:
            launcher.send_signal(signals.END_SIGNAL)
            try:
                launcher.wait(_SHUTDOWN_SECONDS)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()


def _failure(launch: Launch, processes: Sequence[_Process], exit_code: int) -> Exception:
    """What to raise: the first cause, and not that others lost who caused it."""
    errors = [process.error for process in processes if process.error is not None]
    for error in errors:
        kind = getattr(vlm.errors, error["error"], None)
        if isinstance(kind, type) and issubclass(kind, VlmError):
            return kind(error["message"])
    for error in errors:
        if error["error"] not in (_LOST, _HUNG):
            return RuntimeError(f"one of several processes failed:\n{error['trace']}")
    steps = ", ".join(
        f"process {number} finished {'no step' if own.last_step is None else f'step {own.last_step}'}"
        for number, own in enumerate(processes)
    )
    for error in errors:
        # The launcher has killed the one that hung, which is no cause.
        if error["error"] == _HUNG:
            return ResourceError(f"{error['message']} ({steps})")
    for failure in read_failures(launch.events_dir):
        if failure.exit_code < 0 and processes[failure.local_rank].error is None:
            return ResourceError(
                f"process {failure.rank} of several was ended by {signal.Signals(-failure.exit_code).name} ({steps}); SIGKILL"
                " mostly means that this machine ran out of memory, SIGABRT that another process hung. Run again to go on from"
                f" what is done.{_last_words(launch, failure.local_rank)}"
            )
    if errors:
        return ResourceError(f"{errors[0]['message']} ({steps})")
    return RuntimeError(
        f"several processes ended with exit code {exit_code} ({steps}); see {launch.events_dir}{_last_words(launch, 0)}"
    )


def _last_words(launch: Launch, local_rank: int) -> str:
    """The end of a process's log, or of the launcher's."""
    paths = [*sorted(launch.events_dir.glob(f"logs/*/*/{local_rank}/stderr.log")), launch.events_dir / "launcher.log"]
    for path in paths:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        if lines:
            return "\n" + "\n".join(lines[-_LOG_LINES:])
    return ""
