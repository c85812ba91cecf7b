"""Two processes that train together against one that trains alone: the tests' own process and a second one, over gloo."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.conftest import PROJECT
from tests.support.tiny_training import ALL_PARTS, FIVE, UNEVEN, At, KilledError, Training, assert_same, kill
from vlm.config import LoraConfig
from vlm.loading.checkpoint import load_checkpoint
from vlm.training.distributed.job import Job
from vlm.training.distributed.ranks import AgreedStop, is_spread
from vlm.training.interrupt import TrainingInterrupted
from vlm.training.train import TrainingSummary, train_adapter
from vlm.training.trainer import AdapterTrainer

Pair = Callable[..., TrainingSummary]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Trains a job on both processes."""
    import torch.distributed as dist

    from vlm.training.distributed.ranks import join

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    # A second process that imports all of this under load takes its time.
    timeout_seconds = "60"
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    log = tmp_path_factory.mktemp("second") / "log"
    with log.open("wb") as output:
        second = subprocess.Popen(
            [sys.executable, "-m", "tests.support.second_process", timeout_seconds],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=PROJECT,
            env=dict(os.environ, RANK="1", LOCAL_RANK="1", **shared),
            text=True,
        )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (shared | {"RANK": "0", "LOCAL_RANK": "0"}).items():
            patch.setenv(name, value)
        ranks = join("cpu", float(timeout_seconds))

        def train(
            job: Job, loaded: Any = None, callbacks: Sequence[Any] = (), stop_after: int | None = None
        ) -> TrainingSummary:
            ranks.stop = AgreedStop()
            if stop_after is not None:
                # It is known when the step after it ends.
                callbacks = [*callbacks, At(stop_after - 1, lambda: ranks.stop.ask(signal.SIGTERM))]
            path = job.work_dir.parent / "job.json"
            job.write(path)
            assert second.stdin is not None
            second.stdin.write(f"{path}\n")
            second.stdin.flush()
            try:
                return train_adapter(
                    loaded or load_checkpoint(job.checkpoint_dir, device="cpu"),
                    job.adapter_dir,
                    job.dataset_dir,
                    job.plan_dir,
                    job.training,
                    job.output_dir,
                    work_dir=job.work_dir,
                    generation=job.generation,
                    evaluation=job.evaluation,
                    callbacks=callbacks,
                    ranks=ranks,
                )
            except Exception:
                print(log.read_text())  # noqa: T201, pytest shows it with a failure
                raise

        yield train
        assert second.stdin is not None
        try:
            second.stdin.close()
            assert second.wait(30) == 0, log.read_text()
        finally:
            second.kill()
            second.wait()
            dist.destroy_process_group()


@pytest.mark.parametrize("model_type", FIVE)
def test_two_processes_train_what_one_does(tiny_run: Callable, tmp_path: Path, pair: Pair, model_type: str) -> None:
    single = Training(tiny_run(model_type), tmp_path / "single", LoraConfig(rank=4), **UNEVEN)
    expected = single.start()
    job = single.job(tmp_path / "pair")
    summary = pair(job, single.run.loaded)
    assert summary.num_steps == expected.num_steps == 6
    assert summary.parameters_without_gradient == expected.parameters_without_gradient
    assert_same(single, job)


def test_padded_batches_rounds_of_answers_and_the_best_adapter(tiny_run: Callable, tmp_path: Path, pair: Pair) -> None:
    settings = UNEVEN | {"packing": False, "generate_every_steps": 3, "generate_max_rows": 3, "keep_best": "loss"}
    single = Training(tiny_run("qwen2_5_vl"), tmp_path / "single", LoraConfig(rank=4), **settings)
    expected = single.start()
    job = single.job(tmp_path / "pair")
    summary = pair(job, single.run.loaded)
    assert (summary.best_step, summary.best_value) == (expected.best_step, pytest.approx(expected.best_value, rel=1e-4))
    assert_same(single, job)


def test_a_process_that_runs_out_of_memory_goes_on_with_smaller_packs_by_itself(
    tiny_run: Callable, tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 2, "batch_size": 6, "gradient_accumulation": 1}
    single = Training(tiny_run("qwen2_5_vl"), tmp_path / "single", LoraConfig(rank=4), **settings)
    single.start()
    failures = 0
    stock = AdapterTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal failures
        if model.training and failures == 0:
            failures += 1
            raise torch.OutOfMemoryError("no room")
        return stock(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", compute_loss)
    job = single.job(tmp_path / "pair")
    pair(job, single.run.loaded)
    assert failures == 1
    assert_same(single, job)


def test_full_finetuning_and_a_checkpoint_of_another_number_of_processes(
    tiny_run: Callable, tmp_path: Path, pair: Pair
) -> None:
    settings = UNEVEN | {"checkpoint_every_steps": 2}
    single = Training(tiny_run("qwen2_5_vl"), tmp_path / "single", ALL_PARTS, **settings)
    single.start()
    broken = Training(single.run, tmp_path / "broken", ALL_PARTS, **settings)
    with pytest.raises(KilledError):
        broken.start([At(3, kill)])
    shutil.copytree(tmp_path / "broken" / "work", tmp_path / "pair" / "work")
    job = single.job(tmp_path / "pair")
    assert pair(job, single.run.loaded).resumed_from_step == 2
    assert_same(single, job)


class Slices(TrainerCallback):
    """Notes what this process keeps of the language model's layers."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        spread = [own for own in model.parameters() if is_spread(own)]
        self.share = sum(own._local_tensor.numel() for own in spread) / sum(own.numel() for own in spread)
        self.num_packed = sum(own.shape[1:] == (1,) for own in spread)


def test_full_finetuning_of_a_spread_model_from_one_process_and_back(
    tiny_run: Callable, tmp_path: Path, pair: Pair
) -> None:
    settings = UNEVEN | {"optimizer": "adamw"}
    # It has layers that text alone does not run through.
    single = Training(tiny_run("mllama"), tmp_path / "single", ALL_PARTS, **settings)
    single.start()
    broken = Training(single.run, tmp_path / "broken", ALL_PARTS, **settings, checkpoint_every_steps=2)
    with pytest.raises(KilledError):
        broken.start([At(3, kill)])
    shutil.copytree(tmp_path / "broken" / "work", tmp_path / "pair" / "work")
    slices = Slices()
    job = broken.job(tmp_path / "pair", strategy="fsdp2")
    with pytest.raises(TrainingInterrupted, match="SIGTERM after step 5"):
        pair(job, callbacks=[slices], stop_after=5)
    assert 0.4 < slices.share < 0.6
    shutil.copytree(job.work_dir, tmp_path / "again" / "work")
    assert pair(job).resumed_from_step == 5
    assert_same(single, job)
    # One process goes on from what two have left.
    shutil.rmtree(tmp_path / "broken" / "work")
    shutil.copytree(tmp_path / "again" / "work", tmp_path / "broken" / "work")
    assert broken.start().resumed_from_step == 5
    shutil.copytree(tmp_path / "broken" / "out", job.output_dir, dirs_exist_ok=True)
    assert_same(single, job)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "mllama", "deepseek_ocr"])
def test_an_adapter_over_a_spread_four_bit_model(
    tiny_run: Callable, tmp_path: Path, pair: Pair, model_type: str
) -> None:
    single = Training(tiny_run(model_type, "nf4"), tmp_path / "single", LoraConfig(rank=4), **UNEVEN)
    single.start()
    slices = Slices()
    job = single.job(tmp_path / "pair", strategy="fsdp2")
    pair(job, callbacks=[slices])
    assert slices.num_packed > 0
    assert 0.4 < slices.share < 0.6
    assert_same(single, job)
