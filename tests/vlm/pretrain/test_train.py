"""The loop: it learns, resumes exactly, and ends in a model with a card."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlm.config.pretrain import ArchitectureConfig, CurriculumConfig, PretrainConfig
from vlm.errors import ConfigError
from vlm.kernels.head_loss import head_loss
from vlm.pretrain import train
from vlm.pretrain.finish import finish
from vlm.pretrain.model import new_model, patches_by_product
from vlm.pretrain.train import TrainingState, pretrain
from vlm.training.interrupt import TrainingInterrupted

Make = Callable[..., PretrainConfig]


def test_patches_by_product_are_those_of_the_convolution() -> None:
    model = new_model(ArchitectureConfig(vision_layers=2, vision_width=64, language_layers=1, language_width=128), 0)
    weight = model.base_model.visual.patch_embed.proj.weight
    pixels = torch.randn(8, 1176, generator=torch.Generator().manual_seed(0))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        output = model.base_model.visual.patch_embed(pixels)
        weight.grad = None
        output.square().sum().backward()
        assert weight.grad is not None
        return output.detach(), weight.grad

    output, gradient = run()
    with patches_by_product(model):
        ours, our_gradient = run()
    # Sums of 1,176 products of order 0.02 in float32, in another order.
    torch.testing.assert_close(ours, output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_gradient, gradient, atol=1e-4, rtol=1e-5)


@pytest.fixture
def interrupted_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Has the time of a run be over after some steps."""

    def set_steps(number: int | None) -> None:
        calls = iter(range(1, 1000))
        monkeypatch.setattr(train, "_is_over", lambda *_: number is not None and next(calls) >= number)

    return set_steps


def _weights(trained: TrainingState) -> dict[str, torch.Tensor]:
    return load_file(trained.checkpoint / "weights.safetensors")


def test_a_resumed_training_is_the_same(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_after: Callable[[int | None], None]
) -> None:
    # Two uses of blocks of three packs: the breaks lie in the first use and in the second.
    monkeypatch.setattr(train, "_BLOCK", 3)
    interrupted_after(None)
    straight = pretrain(small())
    assert straight.is_finished
    assert straight.progress.step == 8
    for number, steps in enumerate((2, 3, None)):
        interrupted_after(steps)
        resumed = pretrain(small(work_dir=str(tmp_path / "other")))
        assert resumed.is_finished == (number == 2)
    assert (resumed.progress.step, resumed.progress.num_runs) == (8, 3)
    assert resumed.progress.num_lines == straight.progress.num_lines
    expected = _weights(straight)
    for name, weight in _weights(resumed).items():
        # One thread of float32 or several: sums may be cut differently, nothing else.
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-4, msg=name)
    # A finished training is not trained on.
    assert pretrain(small(work_dir=str(tmp_path / "other"))).progress.num_runs == 3


def test_another_setting_is_another_training(small: Make, interrupted_after: Callable[[int | None], None]) -> None:
    interrupted_after(2)
    assert pretrain(small()).progress.step == 2
    # How long a run lasts is no part of the training, the learning rate is.
    interrupted_after(2)
    assert pretrain(small(run_minutes=3.0)).progress.step == 4
    interrupted_after(2)
    assert pretrain(small(learning_rate=1e-3)).progress.step == 2


def test_it_learns_and_ends_in_a_model_with_a_card(small: Make, tmp_path: Path) -> None:
    config = small(num_steps=30, log_every_steps=10)
    trained = pretrain(config)
    losses = [entry["loss"] for entry in trained.progress.history]
    # From about log(384) = 5.95; how often each letter stands alone in these texts gives about 4.
    assert losses[0] > 4.5
    assert losses[-1] < losses[0] - 0.8
    content = finish(trained, config)
    readings = content["readings"]
    assert {"drawn: words", "drawn: nonsense"} <= set(readings)
    assert all(reading["cer"] > 0.3 for reading in readings.values()), "nothing reads after thirty steps"
    output = Path(config.output_dir)
    written = json.loads((output / "pretraining.json").read_text())
    assert written["progress"]["step"] == 30
    assert "work_dir" not in written["config"]
    card = (output / "README.md").read_text()
    assert f"{trained.progress.num_lines:,} drawn lines" in card
    assert str(tmp_path) not in card + json.dumps(written)
    assert all(path.stat().st_size <= 10e6 for path in output.glob("*.safetensors"))


def test_the_model_of_the_defaults_is_small_enough_to_be_committed() -> None:
    model = new_model(ArchitectureConfig(), 0)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 8e6 < num_parameters < 15e6


def test_time_ends_a_training_without_a_number_of_steps(small: Make) -> None:
    trained = pretrain(small(num_steps=None, minutes=0.02, curriculum=CurriculumConfig(last_longest=5)))
    assert trained.is_finished
    assert trained.progress.step > 0
    assert trained.progress.seconds >= 1.2


def test_a_signal_ends_a_run_at_a_step_with_a_checkpoint(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def over(config: Any, began: float, flag: Any) -> bool:
        flag.signum = signal.SIGTERM
        return True

    monkeypatch.setattr(train, "_is_over", over)
    with pytest.raises(TrainingInterrupted, match="SIGTERM after step 1"):
        pretrain(small())
    monkeypatch.undo()
    assert pretrain(small(num_steps=8)).progress.num_runs == 2


def test_an_infinite_loss_is_an_error_and_leaves_no_checkpoint(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total, num_right = head_loss(*args)
        return total * float("inf"), num_right

    monkeypatch.setattr(train, "head_loss", spoilt)
    # Whether the log comes first or the checkpoint.
    for log_every_steps in (1, 100):
        config = small(log_every_steps=log_every_steps, num_steps=2)
        with pytest.raises(ConfigError, match=r"infinite by step|became inf.*lower learning_rate 0\.003"):
            pretrain(config)
        assert not list(Path(config.work_dir).glob("checkpoint-*"))
