"""Two GPUs that train together against one: sums over NCCL, FSDP2 on CUDA, and what becomes of a rank that is lost or hangs."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_models import is_available, make_tiny_checkpoint
from tests.support.tiny_runs import mixed_rows, write_dataset
from tests.support.tiny_training import ALL_PARTS, FIVE, RESUMED, UNEVEN, Training, assert_same
from tests.vlm.conftest import TinyRun
from vlm.config import LoraConfig, ModelConfig
from vlm.errors import ResourceError
from vlm.loading.build import build_checkpoint
from vlm.loading.checkpoint import load_checkpoint
from vlm.processes.events import EventReader, events_file
from vlm.training.distributed.job import Job
from vlm.training.distributed.launch import train_on_processes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

FAMILIES_HERE = [
    pytest.param(name, marks=pytest.mark.skipif(not is_available(name), reason=f"transformers lacks {name}"))
    for name in FIVE
]
LONG = RESUMED | {"max_steps": 100, "checkpoint_every_steps": 50}


@pytest.fixture(scope="module")
def gpu_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyRun]:
    """As `tiny_run`, on the first GPU and in a precision."""
    made: dict[tuple[str, str, str], TinyRun] = {}

    def get(model_type: str, quantization: str, dtype: str) -> TinyRun:
        key = (model_type, quantization, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp("-".join(key))
            source, checkpoint = make_tiny_checkpoint(model_type, folder / "source"), folder / "checkpoint"
            checkpoint.mkdir()
            config = ModelConfig(name=str(source), quantization=quantization, precision=dtype)
            build_checkpoint(config, checkpoint, device="cuda", dtype=dtype)
            loaded = load_checkpoint(checkpoint, device="cuda")
            rows = {"train": mixed_rows(8), "validation": mixed_rows(3), "test": mixed_rows(2)}
            made[key] = TinyRun(loaded, write_dataset(folder / "dataset", loaded.processing, rows))
        return made[key]

    return get


def assert_close(single: Training, job: Job) -> None:
    """In bfloat16, sums in another order differ by a part in a hundred; what AdamW makes of that adds up over steps."""
    lines = [json.loads(line) for line in (job.output_dir / "training" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in single.metrics]
    for own, other in zip(lines, single.metrics, strict=True):
        for name in {"loss", "eval_loss"} & set(other):
            assert own[name] == pytest.approx(other[name], rel=0.02), (name, own["step"])
        # A gradient that was summed twice, or on one GPU only, is off by far more.
        if "grad_norm" in other:
            assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.1), own["step"]
    found = load_file(job.output_dir / "adapter" / "adapter_model.safetensors")
    assert set(found) == set(single.weights)


def train_both(single: Training, job: Job) -> None:
    single.start()
    torch.cuda.empty_cache()
    train_on_processes(job)


@pytest.mark.parametrize("model_type", FAMILIES_HERE)
def test_two_gpus_train_what_one_does_in_float32(gpu_run: Callable, tmp_path: Path, model_type: str) -> None:
    settings = UNEVEN | {"optimizer": "adamw"}
    single = Training(gpu_run(model_type, "none", "float32"), tmp_path / "single", LoraConfig(rank=4), **settings)
    job = single.job(tmp_path / "pair")
    train_both(single, job)
    assert_same(single, job)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("model_type", FAMILIES_HERE)
def test_an_adapter_over_a_four_bit_model(gpu_run: Callable, tmp_path: Path, model_type: str, strategy: str) -> None:
    run = gpu_run(model_type, "nf4", "bfloat16")
    single = Training(run, tmp_path / "single", LoraConfig(rank=4), **UNEVEN)
    job = single.job(tmp_path / "pair", strategy=strategy)
    train_both(single, job)
    assert_close(single, job)


@pytest.mark.parametrize("model_type", FAMILIES_HERE)
def test_full_finetuning_of_a_spread_model(gpu_run: Callable, tmp_path: Path, model_type: str) -> None:
    run = gpu_run(model_type, "none", "bfloat16")
    settings = UNEVEN | {"optimizer": "adamw", "learning_rate": 1e-3}
    single = Training(run, tmp_path / "single", ALL_PARTS, **settings)
    job = single.job(tmp_path / "pair", strategy="fsdp2")
    train_both(single, job)
    assert_close(single, job)


class At:
    """Sends the second process a signal once, when a step's figures come."""

    def __init__(self, job: Job, step: int, signum: int) -> None:
        self.job, self.step, self.signum = job, step, signum
        self.sent_at = float("nan")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float]) -> None:
        if state.global_step == self.step:
            pid = next(EventReader(events_file(self.job.events_dir, 1)).new())["pid"]
            os.kill(pid, self.signum)
            self.sent_at = time.monotonic()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_or_hung_gpu_ends_the_training_within_a_minute_and_it_resumes_on_one(
    gpu_run: Callable, tmp_path: Path, strategy: str, signum: int
) -> None:
    run = gpu_run("qwen2_5_vl", "nf4", "bfloat16")
    single = Training(run, tmp_path / "single", LoraConfig(rank=4), **LONG)
    job = single.job(tmp_path / "pair", strategy=strategy)
    at = At(job, 70, signum)
    with pytest.raises(ResourceError, match=r"Run again|run again"):
        train_on_processes(job, [at])
    assert time.monotonic() - at.sent_at < 60
    ending = Training(run, tmp_path / "single", LoraConfig(rank=4), **LONG)
    ending.root = tmp_path / "pair"
    for name in ("initial", "plan"):
        (tmp_path / "pair" / name).symlink_to(tmp_path / "single" / name)
    resumed_from = ending.start().resumed_from_step
    assert resumed_from is not None
    assert resumed_from >= 50
