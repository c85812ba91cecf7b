from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_models import TINY, UNLIKE_FAMILIES
from tests.support.tiny_training import (
    ALL_PARTS,
    RESUMED,
    At,
    KilledError,
    Training,
    assert_same_gradients,
    first_gradients,
    kill,
    slow_reference,
)
from vlm.config import LoraConfig
from vlm.families import FAMILIES
from vlm.training.trainer import AdapterTrainer


@pytest.mark.parametrize("model_type", FAMILIES)
def test_full_finetuning_is_the_slow_reference(tiny_run: Callable, tmp_path: Path, model_type: str) -> None:
    run = tiny_run(model_type)
    before = {name: parameter.clone() for name, parameter in run.loaded.model.named_parameters()}
    loss, gradients = first_gradients(run, tmp_path / "one", ALL_PARTS, batch_size=4, gradient_accumulation=1)
    expected_loss, expected = slow_reference(run, tmp_path / "one")
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert_same_gradients(gradients, expected)
    assert set(gradients) == set(before) - set(TINY[model_type].idle_parameters)
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.loaded.model.named_parameters())


@pytest.mark.parametrize("model_type", UNLIKE_FAMILIES)
def test_full_finetuning_resumes_to_the_same_bits(tiny_run: Callable, tmp_path: Path, model_type: str) -> None:
    run = tiny_run(model_type)
    before = {name: parameter.clone() for name, parameter in run.loaded.model.named_parameters()}
    idle = set(TINY[model_type].idle_parameters)
    resumed = RESUMED | {"vision_learning_rate": 1e-3}  # the optimiser's split groups come back as well
    whole = Training(run, tmp_path / "whole", ALL_PARTS, **resumed)
    assert set(whole.start().parameters_without_gradient) == idle
    broken = Training(run, tmp_path / "broken", ALL_PARTS, **resumed)
    with pytest.raises(KilledError):
        broken.start([At(3, kill)])
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.loaded.model.named_parameters())
    summary = broken.start()
    assert summary.resumed_from_step == 2
    assert set(summary.parameters_without_gradient) == idle
    assert set(whole.weights) == set(before)
    for name, tensor in whole.weights.items():
        assert torch.equal(broken.weights[name], tensor), name
    moved = [name for name, tensor in whole.weights.items() if not torch.equal(tensor, before[name])]
    assert len(moved) > 0.9 * len(before)
    assert idle.isdisjoint(moved)
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.loaded.model.named_parameters())
    names = {path.name for path in (tmp_path / "whole" / "out" / "adapter").iterdir()}
    assert names == {"adapter_model.safetensors", "targets.json"}


def test_fully_trained_weights_answer(tiny_run: Callable, tmp_path: Path) -> None:
    from vlm.config import GenerationConfig
    from vlm.evaluation.predictions import read_predictions
    from vlm.generate import generate_predictions

    run = tiny_run("qwen2_5_vl")
    # Enough to learn the first answer by heart.
    lora = LoraConfig(full_finetuning=("projector", "language"))
    training = Training(run, tmp_path, lora, max_steps=12, batch_size=8, gradient_accumulation=1)
    training.start()
    assert training.metrics[-2]["loss"] < 0.5 * training.metrics[0]["loss"]
    answers = {}
    for name, adapter in (("tuned", tmp_path / "out" / "adapter"), ("base", None)):
        settings = GenerationConfig(max_new_tokens=4)
        generate_predictions(run.loaded, run.dataset_dir, settings, tmp_path / name, adapter_dir=adapter)
        answers[name] = [prediction.prediction for prediction in read_predictions(tmp_path / name)[1]]
    assert answers["tuned"] != answers["base"]


@pytest.mark.parametrize(("lora", "keeps_copies"), [(LoraConfig(rank=2), None), (ALL_PARTS, False)])
def test_copies_of_weights_do_not_outlive_their_layer(
    tiny_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: LoraConfig, keeps_copies: bool | None
) -> None:
    kept = []

    def train(self: AdapterTrainer, **_: Any) -> None:
        kept.append(getattr(self.accelerator.autocast_handler, "cache_enabled", None))
        raise KilledError

    monkeypatch.setattr(AdapterTrainer, "train", train)
    with pytest.raises(KilledError):
        Training(tiny_run("qwen2_5_vl"), tmp_path, lora, max_steps=1).start()
    assert kept == [keeps_copies]
