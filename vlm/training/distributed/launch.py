"""Trains on several processes from within one that does not train. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from vlm import progress
from vlm.processes.events import Event
from vlm.processes.plan import Launch
from vlm.processes.run import run_processes
from vlm.training.distributed.job import Job
from vlm.training.interrupt import StopFlag, TrainingInterrupted
from vlm.training.plan import read_plan
from vlm.training.results import TrainingSummary, read_summary

_WORKER = "vlm.training.distributed.worker"


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
    bar = progress.bar("training", read_plan(job.plan_dir).num_steps, unit="step")
    shown = 0
    begun = False
    interrupted: Event | None = None

    def take(number: int, event: Event) -> None:
        nonlocal shown, begun, interrupted
        begun = True
        if "interrupted" in event:
            interrupted = event
        elif "log" in event:
            for callback in callbacks:
                callback.on_log(None, SimpleNamespace(global_step=event["step"]), None, logs=event["log"])
        elif "step" in event and number == 0:
            # A training that resumes begins further on.
            bar.update(event["step"] - shown)
            shown = event["step"]

    several = job.training.distributed
    launch = Launch(
        worker=_WORKER,
        job=path,
        events_dir=job.events_dir,
        num_processes=job.num_processes,
        num_machines=several.num_machines,
        machine_rank=several.machine_rank,
        main_address=several.main_address,
        # Within a step the others notice sooner.
        silent_seconds=max(120.0, 2 * several.timeout_seconds),
    )
    with StopFlag() as flag:
        try:
            run_processes(launch, take, should_stop=lambda: flag.signum is not None)
        finally:
            bar.close()
        if flag.signum is not None and not begun:
            raise TrainingInterrupted(0, flag.signum)
        if interrupted is not None:
            raise TrainingInterrupted(interrupted["interrupted"], flag.signum or interrupted["signal"])
    return read_summary(job.output_dir / "training") if several.machine_rank == 0 else None
