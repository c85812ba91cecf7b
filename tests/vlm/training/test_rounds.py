"""Rounds of answers during a training, the best adapter, and stopping early."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState

from vlm.config import EvaluationConfig, GenerationConfig, LoraConfig, TrainingConfig
from vlm.errors import DataError
from vlm.evaluation.predictions import read_predictions
from vlm.evaluation.scores import corpus_values, score_rows
from vlm.families import FAMILIES
from vlm.generate import generate_predictions
from vlm.lora.build import build_adapter
from vlm.lora.peft_model import adapter_parameters
from vlm.training import rounds
from vlm.training.best import KeepBest
from vlm.training.plan import make_plan
from vlm.training.rounds import spread_rows
from vlm.training.train import TrainingSummary, train_adapter

BASE = {
    "learning_rate": 5e-3,
    "warmup_fraction": 0.0,
    "log_every_steps": 1,
    "batch_size": 2,
    "gradient_accumulation": 2,
}
GENERATION = GenerationConfig(split="validation", max_new_tokens=6, batch_size=2)
EVALUATION = EvaluationConfig(metrics=("cer", "exact_match"))


def prepare(run: Any, root: Path, training: TrainingConfig, lora: LoraConfig) -> None:
    build_adapter(run.loaded, lora, root / "initial")
    folders = (run.dataset_dir, run.checkpoint_dir, root / "initial", training, root / "plan")
    make_plan(*folders, device="cpu", dtype="float32")


def train(run: Any, root: Path, training: TrainingConfig, callbacks: Sequence[Any] = ()) -> TrainingSummary:
    folders = (root / "initial", run.dataset_dir, root / "plan", training, root / "out")
    return train_adapter(
        run.loaded, *folders, work_dir=root / "work", callbacks=callbacks, generation=GENERATION, evaluation=EVALUATION
    )


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "out" / "adapter" / "adapter_model.safetensors")


def lines(root: Path, name: str) -> list[tuple[int, float]]:
    text = (root / "out" / "training" / "metrics.jsonl").read_text()
    return [(line["step"], line[name]) for line in map(json.loads, text.splitlines()) if name in line]


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rounds_answer_as_the_finished_adapter_does(
    tiny_run: Callable, tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(model_type)
    answers: list[list[str]] = []

    def predict(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        answers.append([row.prediction for row in found])
        return found

    original = rounds.predict
    monkeypatch.setattr(rounds, "predict", predict)
    training = TrainingConfig(**BASE, max_steps=3, generate_every_steps=2, keep_best="anls")
    prepare(run, tmp_path, training, LoraConfig(rank=4))
    summary = train(run, tmp_path, training)
    # One as asked, and the end.
    assert [step for step, _ in lines(tmp_path, "generated_cer")] == [2, 3]
    assert [step for step, _ in lines(tmp_path, "loss")] == [1, 2, 3]
    adapter = tmp_path / "out" / "adapter"
    generate_predictions(run.loaded, run.dataset_dir, GENERATION, tmp_path / "predictions", adapter_dir=adapter)
    predictions = read_predictions(tmp_path / "predictions")[1]
    number = [2, 3].index(summary.best_step)
    assert [row.prediction for row in predictions] == answers[number]
    names = ("cer", "exact_match", "anls")
    expected = corpus_values(score_rows(predictions, EVALUATION, names))
    for name, value in zip(names, expected, strict=True):
        assert lines(tmp_path, f"generated_{name}")[number][1] == value
    assert summary.best_value == max(value for _, value in lines(tmp_path, "generated_anls"))


def test_rounds_change_no_bit(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_vl")
    for name, settings in (("without", {}), ("with", {"generate_every_steps": 1})):
        training = TrainingConfig(**BASE, max_steps=3, **settings)
        (tmp_path / name).mkdir()
        prepare(run, tmp_path / name, training, LoraConfig(rank=4, dropout=0.2))
        train(run, tmp_path / name, training)
    for figure in ("loss", "eval_loss"):
        assert lines(tmp_path / "with", figure) == lines(tmp_path / "without", figure)
    assert_same(weights(tmp_path / "with"), weights(tmp_path / "without"))


class KilledError(Exception):
    pass


class Spoil(TrainerCallback):
    """Makes the adapter much worse after a step, and kills the process after another."""

    def __init__(self, spoil: int, kill: int | None = None) -> None:
        self.steps = spoil, kill
        self.seen: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        parameters = adapter_parameters(model)
        if state.global_step == self.steps[0]:
            generator = torch.Generator().manual_seed(0)
            for parameter in parameters.values():
                parameter.data.normal_(0, 1, generator=generator)
        self.seen[state.global_step] = {name: tensor.detach().clone() for name, tensor in parameters.items()}
        if state.global_step == self.steps[1]:
            raise KilledError


BEST = {"max_steps": 8, "keep_best": "loss", "evaluate_every_steps": 1, "checkpoint_every_steps": 4}


def test_the_best_adapter_is_kept(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    training = TrainingConfig(**BASE, **(BEST | {"max_steps": 4}))
    prepare(run, tmp_path, training, LoraConfig(rank=4))
    spoil = Spoil(3)
    summary = train(run, tmp_path, training, [spoil])
    losses = dict(lines(tmp_path, "eval_loss"))
    assert set(losses) == {1, 2, 3, 4}
    best = min(losses, key=losses.__getitem__)
    assert best < 3
    assert (summary.best_step, summary.best_value) == (best, losses[best])
    assert (summary.num_steps, summary.stopped_early) == (4, False)
    assert_same(weights(tmp_path), spoil.seen[best])


def test_stopping_early_and_resuming_give_the_same_bits(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    training = TrainingConfig(**BASE, **BEST, early_stopping_patience=3, generate_every_steps=2)
    summaries = {}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        prepare(run, tmp_path / name, training, LoraConfig(rank=4, dropout=0.2))
    summaries["whole"] = train(run, tmp_path / "whole", training, [Spoil(3)])
    # Step 2 or an earlier one is the best; the three after the spoilt one are worse.
    assert summaries["whole"].best_step == 2
    assert (summaries["whole"].num_steps, summaries["whole"].stopped_early) == (5, True)
    with pytest.raises(KilledError):
        train(run, tmp_path / "killed", training, [Spoil(3, kill=5)])
    # The best one of the dead process is gone, or a later one is in its place: the checkpoint has its own.
    (tmp_path / "killed" / "work" / "best_adapter.safetensors").unlink()
    summaries["killed"] = train(run, tmp_path / "killed", training)
    assert summaries["killed"].resumed_from_step == 4
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    for figure in ("loss", "eval_loss", "generated_cer"):
        assert lines(tmp_path / "whole", figure) == lines(tmp_path / "killed", figure)
    assert [step for step, _ in lines(tmp_path / "whole", "generated_cer")] == [2, 4, 5]
    assert summaries["killed"].best_value == summaries["whole"].best_value


def test_a_training_that_had_stopped_early_does_not_go_on(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    training = TrainingConfig(**BASE, **BEST, early_stopping_patience=2)
    prepare(run, tmp_path, training, LoraConfig(rank=4))
    first = train(run, tmp_path, training, [Spoil(3)])
    assert first.num_steps == 4  # with a checkpoint at this very step
    kept, curve = weights(tmp_path), lines(tmp_path, "eval_loss")
    never = Spoil(3)
    again = train(run, tmp_path, training, [never])
    assert not never.seen
    assert (again.num_steps, again.resumed_from_step, again.stopped_early) == (4, 4, True)
    assert_same(weights(tmp_path), kept)
    assert lines(tmp_path, "eval_loss") == curve


@pytest.mark.parametrize(
    ("keep_best", "values", "best_step", "stop_step"),
    [
        ("loss", [3.0, 2.0, 2.5, 1.0, 1.5, 1.2], 4, 6),
        ("cer", [0.5, 0.5, 0.5], 3, 3),  # of equal ones the latest is kept, but they are no improvement
        ("anls", [0.0, 0.1, 0.0, 0.2, 0.2, 0.1], 5, 6),
    ],
)
def test_what_counts_as_the_best(
    tmp_path: Path, keep_best: str, values: list[float], best_step: int, stop_step: int
) -> None:
    rounds = {"evaluate_every_steps" if keep_best == "loss" else "generate_every_steps": 1}
    training = TrainingConfig(keep_best=keep_best, early_stopping_patience=2, **rounds)
    control, state = TrainerControl(), TrainerState()
    best = KeepBest(training, tmp_path, lambda path: path.write_text(f"step {state.global_step}"))
    for step, value in enumerate(values, 1):
        assert not control.should_training_stop
        state.global_step = step
        best.on_log(None, state, control, {best.figure: value, "other": -1.0})
        best.on_step_end(None, state, control)
    assert control.should_training_stop
    assert (best.step, state.global_step) == (best_step, stop_step)
    best.copy_to(tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == f"step {best_step}"


def test_a_training_without_validation_rows_is_refused(tiny_run: Callable, tmp_path: Path) -> None:
    from tests.support.tiny_runs import mixed_rows, write_dataset

    run = tiny_run("qwen2_5_vl")
    dataset = write_dataset(tmp_path / "dataset", run.loaded.processing, {"train": mixed_rows(2)})
    build_adapter(run.loaded, LoraConfig(rank=2), tmp_path / "initial")
    folders = (dataset, run.checkpoint_dir, tmp_path / "initial")
    for settings, message in (
        ({"keep_best": "loss", "evaluate_every_steps": 1}, r"training.keep_best 'loss' needs validation rows"),
        ({"generate_every_steps": 3}, r"training.generate_every_steps 3 needs validation rows"),
    ):
        with pytest.raises(DataError, match=message):
            make_plan(*folders, TrainingConfig(**settings), tmp_path / "plan", device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stopping_patience": 2}, "no effect without keep_best"),
        ({"keep_best": "loss"}, "only come with evaluate_every_steps"),
        ({"keep_best": "cer", "evaluate_every_steps": 2}, "only come with generate_every_steps"),
        ({"keep_best": "speed"}, "Input should be 'none'"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingConfig(**settings)


def test_rows_of_a_round_are_spread_over_the_split() -> None:
    assert spread_rows(3, 32) == [0, 1, 2]
    assert spread_rows(101, 3) == [0, 50, 100]
    assert len(set(spread_rows(1000, 999))) == 999
    assert spread_rows(5, 1) == [0]
