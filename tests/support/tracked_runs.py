"""Tracked runs that are killed while they make MLflow's database, that make it together, or that are interrupted."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

from tasks.session import Session
from tasks.tracking import Tracker
from tests.support.forked import Child, die_at, fork, run_to_the_end, settings
from tests.support.killed_runs import Undisturbed, newest_checkpoint
from tests.support.local_flow import exact_artifacts
from tests.support.mlflow_log import Log
from vlm.config import RunConfig

_SECONDS = 120.0
# Prefect kills after half a minute what it has asked to end, other supervisors sooner.
_SECONDS_TO_END = 20.0


def _log_nothing(folder: Path, count: int | None) -> dict[str, Any]:
    """A flow that logs and did nothing, in a child; gives the number of its statements."""
    num_statements = die_at(folder, count, statements=True)
    config = settings(str(folder / "store"), tracking=True)
    tracker = Tracker(Session.open(RunConfig.model_validate(config)), None)
    tracker.start()
    tracker.finish({}, {})
    return {"statements": num_statements()}


def create_together(folder: Path, kill_at: tuple[int, ...], num_processes: int) -> list[str]:
    """Kills processes while they make a database, then has several make and use it at once.

    Args:
        folder: Receives the database, which is not there yet.
        kill_at: At which of their changes to files and statements.
        num_processes: How many.

    Returns:
        What should not be; empty if all is well.
    """
    folder.mkdir()
    faults = [
        f"there were fewer than {count} changes"
        for count in kill_at
        if fork(lambda count=count: _log_nothing(folder, count), folder / "answer.json").wait(_SECONDS) is not None
    ]
    children: list[Child] = [
        fork(lambda: _log_nothing(folder, None), folder / f"answer-{number}.json") for number in range(num_processes)
    ]
    for child in children:
        try:
            child.wait(_SECONDS)
        except (RuntimeError, TimeoutError) as error:
            faults.append(str(error))
    log = Log(folder / "mlflow.db")
    if Counter(log.status.values()) != {"FINISHED": num_processes}:
        faults.append(f"runs are {log.status}")
    return faults + log.faults


def _interrupted_run(config: dict[str, Any], step: int) -> dict[str, Any]:
    """A run that gets SIGTERM at a step of its training, in a child, handled as on the command line."""
    import mlflow

    from flows.cli import end

    log_metrics = mlflow.log_metrics

    def log_and_interrupt(figures: dict[str, float], step: int | None = None) -> None:
        log_metrics(figures, step=step)
        if step == at:
            moments.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

    at, moments = step, list[float]()
    signal.signal(signal.SIGTERM, end)
    with mock.patch("mlflow.log_metrics", log_and_interrupt):
        try:
            run_to_the_end(config)
        except SystemExit as error:
            return {"status": error.code, "seconds": time.monotonic() - moments[0]}
    return {"status": 0}


def interrupt_and_resume(folder: Path, undisturbed: Undisturbed) -> list[str]:
    """Interrupts a run in its training, looks, and runs it again.

    Args:
        folder: Receives its store.
        undisturbed: What it must give.

    Returns:
        What should not be; empty if all is well.
    """
    undisturbed.prepare_logging(folder / "store")
    config = settings(str(folder / "store"), tracking=True)
    stopped = fork(lambda: _interrupted_run(config, 2), folder / "answer.json").wait(_SECONDS)
    log = Log(folder / "mlflow.db")
    faults = []
    if stopped is None or stopped["status"] != 128 + signal.SIGTERM or stopped["seconds"] > _SECONDS_TO_END:
        faults.append(f"the interrupted run ended with {stopped}")
    # Where the signal comes while a step is logged, that step counts as over.
    if (step := newest_checkpoint(folder / "store")) not in (2, 3):
        faults.append(f"the interrupted run left a checkpoint of step {step}")
    if sorted(log.status.values()) != ["KILLED", "KILLED"]:
        faults.append(f"the interrupted run is {log.status}")
    answer = fork(lambda: {"summary": run_to_the_end(config)}, folder / "answer.json").wait(_SECONDS)
    assert answer is not None
    if exact_artifacts(answer["summary"]) != undisturbed.expected:
        faults.append("other artifacts than the undisturbed run")
    return faults + Log(folder / "mlflow.db").check_finished(answer["summary"], undisturbed.curve)
