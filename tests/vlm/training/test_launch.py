"""Trainings on processes of their own, as the train task starts them: killed, hung, stopped, resumed."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import signal_all
from tests.support.tiny_training import RESUMED, Training, assert_same
from vlm.config import DistributedConfig, LoraConfig
from vlm.errors import ResourceError
from vlm.processes.events import EventReader, events_file
from vlm.training.distributed.job import Job
from vlm.training.distributed.launch import train_on_processes
from vlm.training.interrupt import TrainingInterrupted

SETTINGS = RESUMED | {"max_steps": 14}


class Figures:
    """Does something when a step's figures come."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float]) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []
        if state.global_step == self.step:
            self.action()


def test_a_killed_process_ends_the_training_which_resumes_stops_and_ends_elsewhere(
    tiny_run: Callable, tmp_path: Path
) -> None:
    run = tiny_run("qwen2_5_vl")
    single = Training(run, tmp_path / "single", LoraConfig(rank=4), **SETTINGS)
    single.start()
    job = single.job(tmp_path / "pair")

    def kill_the_second() -> None:
        pid = next(EventReader(events_file(job.events_dir, 1)).new())["pid"]
        os.kill(pid, signal.SIGKILL)

    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"process 1 of several was ended by SIGKILL.*Run again"):
        train_on_processes(job, [Figures(3, kill_the_second)])
    # Imports of all processes included.
    assert time.monotonic() - started < 120
    (checkpoint,) = (job.work_dir).glob("checkpoint-*")
    resumed_from = int(checkpoint.name.partition("-")[2])
    assert resumed_from >= 2

    figures = Figures(resumed_from + 3, lambda: signal_all(signal.SIGTERM))
    with pytest.raises(TrainingInterrupted, match="SIGTERM after step") as interrupted:
        train_on_processes(job, [figures])
    last = interrupted.value.step
    assert resumed_from + 3 <= last < 14
    assert len(figures.losses) == last - resumed_from
    assert (job.work_dir / f"checkpoint-{last}" / "complete.json").is_file()

    # One process goes on where two stopped.
    ending = Training(run, tmp_path / "single", LoraConfig(rank=4), **SETTINGS)
    ending.root = tmp_path / "pair"
    for name in ("initial", "plan"):
        (tmp_path / "pair" / name).symlink_to(tmp_path / "single" / name)
    assert ending.start().resumed_from_step == last
    assert_same(single, job)


def test_a_job_comes_back_from_its_file(tmp_path: Path) -> None:
    from vlm.config import EvaluationConfig, GenerationConfig, TrainingConfig

    folders = {name: tmp_path / name for name in Job.__dataclass_fields__ if name.endswith("_dir")}
    training = TrainingConfig(max_steps=3, distributed=DistributedConfig(num_processes=2, strategy="fsdp2"))
    job = Job(
        **folders,
        digest="abc",
        device="cpu",
        num_processes=2,
        training=training,
        generation=GenerationConfig(batch_size=3),
        evaluation=EvaluationConfig(ignore_case=True),
    )
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job
    assert json.loads((tmp_path / "job.json").read_text())["training"]["max_steps"] == 3
