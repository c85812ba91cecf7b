import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.support.tiny_models import TINY, UNLIKE_FAMILIES
from tests.support.tiny_runs import batch_of
from tests.support.tiny_training import (
    Training,
    assert_same_gradients,
    fill,
    first_gradients,
    slow_reference,
)
from vlm.config import LoraConfig
from vlm.errors import ConfigError
from vlm.families import FAMILIES
from vlm.lora.attach import attached
from vlm.lora.build import build_adapter
from vlm.lora.peft_model import adapter_parameters


@pytest.mark.parametrize("model_type", FAMILIES)
def test_accumulation_is_one_batch_and_both_are_the_slow_reference(
    tiny_run: Callable, tmp_path: Path, model_type: str
) -> None:
    run = tiny_run(model_type)
    # The first gradient of A is zero as long as B is: a start away from zero tests both.
    lora = LoraConfig(rank=4, seed=3)
    build_adapter(run.loaded, lora, tmp_path / "a" / "initial")
    fill(tmp_path / "a" / "initial")
    for name in "bc":
        shutil.copytree(tmp_path / "a" / "initial", tmp_path / name / "initial")
    whole = first_gradients(run, tmp_path / "a", lora, batch_size=4, gradient_accumulation=1)
    parts = first_gradients(run, tmp_path / "b", lora, batch_size=1, gradient_accumulation=4)
    plain = first_gradients(
        run, tmp_path / "c", lora, batch_size=4, gradient_accumulation=1, gradient_checkpointing=False
    )
    # Sums of about a hundred float32 terms in another order: errors of some 1e-7 relative.
    assert whole[0] == pytest.approx(parts[0], abs=1e-5)
    assert whole[0] == pytest.approx(plain[0], abs=1e-6)
    assert_same_gradients(whole[1], parts[1])
    assert_same_gradients(whole[1], plain[1], atol=1e-6)
    loss, gradients = slow_reference(run, tmp_path / "a")
    assert whole[0] == pytest.approx(loss, abs=1e-5)
    assert_same_gradients(whole[1], gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize(
    ("model_type", "checkpointing"),
    [*((model_type, True) for model_type in FAMILIES), *((model_type, False) for model_type in UNLIKE_FAMILIES)],
)
def test_a_frozen_vision_tower_keeps_no_graph(
    tiny_run: Callable, tmp_path: Path, model_type: str, checkpointing: bool
) -> None:
    run = tiny_run(model_type)
    seen: list[tuple[bool, bool]] = []
    base = run.loaded.model
    hooks = [
        block.register_forward_hook(
            lambda module, inputs, output: seen.append(
                (output.requires_grad, getattr(module, "gradient_checkpointing", False))
            )
        )
        for name, block in base.named_modules()
        if re.fullmatch(run.loaded.family.vision_layer, name)
    ]
    language: list[bool] = []
    hooks.append(
        base.get_submodule(TINY[model_type].language_layers[1]).register_forward_hook(
            lambda module, inputs, output: language.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    )
    try:
        lora = LoraConfig(rank=2, finetune_vision_layers=False)
        first_gradients(
            run, tmp_path, lora, batch_size=2, gradient_accumulation=1, gradient_checkpointing=checkpointing
        )
    finally:
        for hook in hooks:
            hook.remove()
    assert set(seen) == {(False, False)}
    assert any(language)


@pytest.mark.parametrize("model_type", UNLIKE_FAMILIES)
def test_checkpointing_recomputes_every_trained_layer(tiny_run: Callable, tmp_path: Path, model_type: str) -> None:
    run = tiny_run(model_type)
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda module, inputs, others: calls.update([name])

    # Validation calls them as well, but as often in both runs. The names are those of full attention modules.
    attention = {
        name.rpartition(".")[0] for name, _ in run.loaded.model.named_modules() if name.endswith(("q_proj", "qkv"))
    }
    first = {name: module for name, module in run.loaded.model.named_modules() if name in attention}
    hooks = [module.register_forward_pre_hook(count(name), with_kwargs=True) for name, module in first.items()]
    counts = []
    try:
        for checkpointing in (True, False):
            calls.clear()
            settings = {"batch_size": 8, "gradient_accumulation": 1, "gradient_checkpointing": checkpointing}
            Training(run, tmp_path / str(checkpointing), LoraConfig(rank=2), max_steps=1, **settings).start()
            counts.append(dict(calls))
    finally:
        for hook in hooks:
            hook.remove()
    # Of this model's rows one has crops, which go through the tower apart from the pages.
    passes = {
        name: 2 if model_type == "deepseek_ocr" and run.loaded.family.part_of(name) == "vision" else 1 for name in first
    }
    assert {name: counts[0][name] - counts[1][name] for name in first} == passes


@pytest.mark.parametrize("model_type", UNLIKE_FAMILIES)
def test_loss_falls_on_a_repeated_batch_and_the_model_is_left_as_found(
    tiny_run: Callable, tmp_path: Path, model_type: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(model_type)
    base = run.loaded.model
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    modules = [(name, id(module)) for name, module in base.named_modules()]
    training = Training(run, tmp_path, LoraConfig(rank=8), max_steps=4, batch_size=8, gradient_accumulation=1)
    capfd.readouterr()
    summary = training.start()
    losses = [line["loss"] for line in training.metrics if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert losses == sorted(losses, reverse=True)
    assert modules == [(name, id(module)) for name, module in base.named_modules()]
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())
    assert "forward" not in base.__dict__
    assert not base.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    assert capfd.readouterr().out == ""
    assert summary.final_loss == losses[-1]
    assert summary.parameters_without_gradient == []
    for line in training.metrics:
        if "loss" in line:
            pace = {"tokens_per_second", "samples_per_second", "data_wait_share"}
            assert {"step", "loss", "learning_rate", "grad_norm"} | pace <= set(line)
            # Batches are made in this process here, in a part of the step's time.
            assert 0 < line["data_wait_share"] < 1
    names = {path.name for path in (tmp_path / "out" / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "targets.json"}


@pytest.mark.parametrize("model_type", UNLIKE_FAMILIES)
def test_validation_loss_is_weighted_by_tokens(tiny_run: Callable, tmp_path: Path, model_type: str) -> None:
    run = tiny_run(model_type)
    training = Training(run, tmp_path, LoraConfig(rank=2), max_steps=3, batch_size=2, evaluate_every_steps=2)
    summary = training.start()
    assert [line["step"] for line in training.metrics if "eval_loss" in line] == [2, 3]
    total, num_tokens = 0.0, 0
    with attached(run.loaded, tmp_path / "out" / "adapter") as model, torch.no_grad():
        for row in range(3):
            batch = batch_of(run.loaded, run.dataset_dir, "validation", [row])
            count = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch).loss) * count
            num_tokens += count
    assert summary.validation_loss == pytest.approx(total / num_tokens, abs=1e-5)


@pytest.mark.parametrize(
    ("model_type", "quantization"),
    [*((model_type, "nf4") for model_type in FAMILIES), *((model_type, "int8") for model_type in UNLIKE_FAMILIES)],
)
def test_a_quantised_base_trains_the_adapter_in_float32(
    tiny_run: Callable, tmp_path: Path, model_type: str, quantization: str
) -> None:
    run = tiny_run(model_type, quantization)
    seen: set[torch.dtype] = set()

    class Types(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.update(parameter.dtype for parameter in adapter_parameters(model).values())

    lora = LoraConfig(rank=4, use_dora=quantization == "nf4")
    training = Training(
        run,
        tmp_path,
        TINY[model_type].without_experts(lora) if lora.use_dora else lora,
        max_steps=3,
        batch_size=4,
        gradient_accumulation=1,
    )
    training.start([Types()])
    assert seen == {torch.float32}
    losses = [line["loss"] for line in training.metrics if "loss" in line]
    assert losses[-1] < losses[0]
    initial = load_file(tmp_path / "initial" / "adapter_model.safetensors")
    moved = [key for key, tensor in training.weights.items() if not torch.equal(tensor, initial[key])]
    assert len(moved) == len(initial)


def test_whole_modules_learn(tiny_run: Callable, tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=("q_proj",), modules_to_save=("lm_head",))
    training = Training(tiny_run("qwen2_vl"), tmp_path, lora, max_steps=2, batch_size=4, gradient_accumulation=1)
    training.start()
    initial = load_file(tmp_path / "initial" / "adapter_model.safetensors")
    key = "base_model.model.lm_head.weight"
    assert (training.weights[key] - initial[key]).abs().max() > 1e-3


def test_a_loss_that_is_no_number_stops_the_training(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    training = Training(run, tmp_path, LoraConfig(rank=2), max_steps=3, batch_size=2, gradient_accumulation=1)

    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            next(iter(adapter_parameters(model).values())).data.fill_(float("nan"))

    with pytest.raises(ConfigError, match=r"loss is nan at step 1.*learning_rate"):
        training.start([Spoil()])


def test_a_plan_for_another_device_is_refused(tiny_run: Callable, tmp_path: Path) -> None:
    training = Training(tiny_run("qwen2_5_vl"), tmp_path, LoraConfig(rank=2), max_steps=1)
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(plan | {"dtype": "bfloat16"}))
    with pytest.raises(ConfigError, match="the plan is for cpu in bfloat16"):
        training.start()


def test_eight_bit_adamw_on_a_cpu_is_refused_by_the_plan(tiny_run: Callable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'adamw_8bit' needs a GPU"):
        Training(tiny_run("qwen2_5_vl"), tmp_path, LoraConfig(rank=2), max_steps=1, optimizer="adamw_8bit")
