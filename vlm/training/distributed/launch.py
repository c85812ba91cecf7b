"""Trains on several processes from within one that does not train: starts them, listens, and says what became of them. No torch."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import vlm
import vlm.errors
from vlm import progress
from vlm.errors import ResourceError, VlmError
from vlm.training.distributed.events import Event, EventReader, events_file
from vlm.training.distributed.job import Job, read_failures
from vlm.training.interrupt import StopFlag, TrainingInterrupted
from vlm.training.plan import read_plan
from vlm.training.results import TrainingSummary, read_summary

_LAUNCHER = "vlm.training.distributed.launcher"
_LOST = "LostProcessError"
_POLL_SECONDS = 0.1
# From asking processes to end to ending them: they get the rest of a step for it. Read by torch's launcher.
_SHUTDOWN_SECONDS = 10
_LOG_LINES = 15


@dataclass
class _Process:
    """What is known of one process of this machine."""

    reader: EventReader
    last_step: int | None = None
    error: Event | None = None
    interrupted: Event | None = None
    logs: list[Event] = field(default_factory=list)


def train_on_processes(job: Job, callbacks: Sequence[Any] = ()) -> TrainingSummary | None:
    """Runs a training on the processes of this machine, and with those of others where there are any.

    This process must have let go of its own model: the others take the GPUs.

    Args:
        job: The training. `events_dir` is emptied first.
        callbacks: Objects whose `on_log` is called as transformers calls a `TrainerCallback`'s, with the step as
            `state.global_step`.

    Returns:
        The content of ``training.json``; None on a machine that leaves writing to another.

    Raises:
        TrainingInterrupted: SIGTERM or Ctrl-C came, to this process or to another one.
        VlmError: What a process ended with, or that it was killed or hung; run again to resume.
    """
    shutil.rmtree(job.events_dir, ignore_errors=True)
    job.events_dir.mkdir(parents=True)
    path = job.events_dir / "job.json"
    job.write(path)
    processes = [_Process(EventReader(events_file(job.events_dir, local))) for local in range(job.num_processes)]
    plan = read_plan(job.plan_dir)
    bar = progress.bar("training", plan.num_steps, unit="step")
    shown = 0

    def listen() -> None:
        nonlocal shown
        for number, process in enumerate(processes):
            for event in process.reader.new():
                _take_in(process, event, callbacks if number == 0 else ())
        if processes[0].last_step is not None and processes[0].last_step > shown:
            bar.update(processes[0].last_step - shown)
            shown = processes[0].last_step

    with StopFlag() as flag, _launched(path, job.events_dir) as (launcher, ask_to_stop):
        try:
            while launcher.poll() is None:
                listen()
                if flag.signum is not None:
                    ask_to_stop()
                time.sleep(_POLL_SECONDS)
        finally:
            listen()
            bar.close()
        interrupted = next((own.interrupted for own in processes if own.interrupted is not None), None)
        if launcher.returncode != 0:
            raise _failure(job, processes, launcher.returncode)
        if interrupted is not None:
            raise TrainingInterrupted(interrupted["interrupted"], flag.signum or interrupted["signal"])
    return read_summary(job.output_dir / "training") if job.training.distributed.machine_rank == 0 else None


def _take_in(process: _Process, event: Event, callbacks: Sequence[Any]) -> None:
    if "log" in event:
        for callback in callbacks:
            callback.on_log(None, SimpleNamespace(global_step=event["step"]), None, logs=event["log"])
    elif "step" in event:
        process.last_step = event["step"]
    elif "warning" in event:
        logging.getLogger(__name__).warning("%s", event["warning"])
    elif "interrupted" in event:
        process.interrupted = event
    elif "error" in event:
        process.error = event


@contextmanager
def _launched(path: Path, events_dir: Path) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], None]]]:
    """The launcher while it runs, and how to ask its processes to stop; none of them outlives the block."""
    root = str(Path(next(iter(vlm.__path__))).parent)
    environment = dict(os.environ, TORCH_ELASTIC_SHUTDOWN_TIMEOUT=str(_SHUTDOWN_SECONDS))
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with (events_dir / "launcher.log").open("wb") as log:
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
            launcher.terminate()
            try:
                launcher.wait(2 * _SHUTDOWN_SECONDS)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()


def _failure(job: Job, processes: Sequence[_Process], exit_code: int) -> Exception:
    """What to raise: the first cause, and not that others lost who caused it."""
    errors = [process.error for process in processes if process.error is not None]
    for error in errors:
        kind = getattr(vlm.errors, error["error"], None)
        if isinstance(kind, type) and issubclass(kind, VlmError):
            return kind(error["message"])
    for error in errors:
        if error["error"] != _LOST:
            return RuntimeError(f"a process of the training failed:\n{error['trace']}")
    steps = ", ".join(
        f"process {number} finished {'no step' if own.last_step is None else f'step {own.last_step}'}"
        for number, own in enumerate(processes)
    )
    for failure in read_failures(job.events_dir):
        if failure.exit_code < 0 and processes[failure.local_rank].error is None:
            return ResourceError(
                f"process {failure.rank} of the training was ended by {signal.Signals(-failure.exit_code).name} ({steps});"
                " SIGKILL mostly means that this machine ran out of memory, SIGABRT that another process hung. Run again to"
                f" resume from the last checkpoint.{_last_words(job, failure.local_rank)}"
            )
    if errors:
        return ResourceError(f"{errors[0]['message']} ({steps})")
    return RuntimeError(
        f"the training's processes ended with exit code {exit_code} ({steps}); see"
        f" {job.events_dir}{_last_words(job, 0)}"
    )


def _last_words(job: Job, local_rank: int) -> str:
    """The end of a process's log, or of the launcher's."""
    paths = [*sorted(job.events_dir.glob(f"logs/*/*/{local_rank}/stderr.log")), job.events_dir / "launcher.log"]
    for path in paths:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        if lines:
            return "\n" + "\n".join(lines[-_LOG_LINES:])
    return ""
