"""Trainings that were killed or stopped go on to the same bits as those that were not."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.tiny_models import TINY, UNLIKE_FAMILIES
from tests.support.tiny_training import RESUMED, At, KilledError, Training, kill
from vlm.config import LoraConfig
from vlm.training.interrupt import TrainingInterrupted

# It makes the random state matter, as the batch size of `RESUMED` does the order.
DROPOUT = LoraConfig(rank=4, dropout=0.2)


@pytest.fixture(scope="module")
def uninterrupted(tiny_run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Training]:
    """Gives a family's finished training; tests only read it."""
    done: dict[str, Training] = {}

    def get(model_type: str) -> Training:
        if model_type not in done:
            lora = TINY[model_type].without_experts(DROPOUT)
            training = Training(tiny_run(model_type), tmp_path_factory.mktemp("uninterrupted"), lora, **RESUMED)
            training.start()
            done[model_type] = training
        return done[model_type]

    return get


@pytest.mark.parametrize("model_type", UNLIKE_FAMILIES)
def test_resuming_after_a_kill_gives_the_same_bits(
    tiny_run: Callable, tmp_path: Path, uninterrupted: Callable[[str], Training], model_type: str
) -> None:
    run = tiny_run(model_type)
    training = Training(run, tmp_path, TINY[model_type].without_experts(DROPOUT), **RESUMED)
    with pytest.raises(KilledError):
        training.start([At(3, kill)])
    assert not any(hasattr(module, "lora_A") for module in run.loaded.model.modules())
    # The process died while it wrote a newer checkpoint: everything is there except the marker.
    shutil.copytree(tmp_path / "work" / "checkpoint-2", tmp_path / "work" / "checkpoint-3")
    (tmp_path / "work" / "checkpoint-3" / "complete.json").unlink()
    summary = training.start()
    assert summary.resumed_from_step == 2
    assert training.weights.keys() == uninterrupted(model_type).weights.keys()
    for key, tensor in uninterrupted(model_type).weights.items():
        assert torch.equal(training.weights[key], tensor), key
    losses = [
        [(line["step"], line["loss"]) for line in done.metrics if "loss" in line]
        for done in (training, uninterrupted(model_type))
    ]
    assert losses[0] == losses[1]


def test_sigterm_stops_at_a_step_and_the_rest_gives_the_same_bits(
    tiny_run: Callable, tmp_path: Path, uninterrupted: Callable[[str], Training]
) -> None:
    training = Training(tiny_run("qwen2_5_vl"), tmp_path, DROPOUT, **RESUMED)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match="SIGTERM after step 3") as raised:
        training.start([At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    assert (raised.value.step, raised.value.signum) == (3, signal.SIGTERM)
    assert not isinstance(raised.value, Exception)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "out").exists()
    assert training.start().resumed_from_step == 3
    for key, tensor in uninterrupted("qwen2_5_vl").weights.items():
        assert torch.equal(training.weights[key], tensor), key


def test_without_checkpoints_only_an_interruption_writes_one(
    tiny_run: Callable, tmp_path: Path, uninterrupted: Callable[[str], Training]
) -> None:
    training = Training(tiny_run("qwen2_5_vl"), tmp_path, DROPOUT, **(RESUMED | {"checkpoint_every_steps": None}))
    with pytest.raises(TrainingInterrupted):
        training.start([At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    assert [path.name for path in (tmp_path / "work").glob("checkpoint-*")] == ["checkpoint-3"]
    assert training.start().resumed_from_step == 3
    for key, tensor in uninterrupted("qwen2_5_vl").weights.items():
        assert torch.equal(training.weights[key], tensor), key
    shutil.rmtree(tmp_path / "work")
    assert training.start().resumed_from_step is None
    assert not list((tmp_path / "work").glob("checkpoint-*"))


def test_a_finished_training_is_only_written_again(
    tiny_run: Callable, uninterrupted: Callable[[str], Training]
) -> None:
    training = uninterrupted("qwen2_5_vl")
    expected = training.weights
    summary = training.start()
    assert summary.resumed_from_step == summary.num_steps == 4
    assert all(torch.equal(training.weights[key], tensor) for key, tensor in expected.items())


def test_checkpoints_of_other_settings_are_not_resumed_from(
    tiny_run: Callable, tmp_path: Path, uninterrupted: Callable[[str], Training]
) -> None:
    shutil.copytree(uninterrupted("qwen2_5_vl").root / "work", tmp_path / "work")
    training = Training(
        tiny_run("qwen2_5_vl"), tmp_path, DROPOUT, **(RESUMED | {"learning_rate": 1e-3, "max_steps": 1})
    )
    assert training.start().resumed_from_step is None
