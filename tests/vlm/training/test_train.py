import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.support.tiny_models import TINY
from tests.support.tiny_runs import batch_of
from vlm.config import LoraConfig, TrainingConfig
from vlm.errors import ConfigError
from vlm.families import FAMILIES
from vlm.lora.attach import attached
from vlm.lora.build import build_adapter
from vlm.lora.peft_model import adapter_parameters
from vlm.training.interrupt import TrainingInterrupted
from vlm.training.plan import make_plan
from vlm.training.train import TrainingSummary, train_adapter

BASE = {"learning_rate": 5e-3, "warmup_fraction": 0.0, "log_every_steps": 1, "weight_decay": 0.0}


class Training:
    """One training with its folders under `root`."""

    def __init__(self, run: Any, root: Path, lora: LoraConfig, **settings: Any) -> None:
        self.run, self.root = run, root
        self.training = TrainingConfig(**(BASE | settings))
        root.mkdir(parents=True, exist_ok=True)
        if not (root / "initial").exists():
            build_adapter(run.loaded, lora, root / "initial")
        make_plan(
            run.dataset_dir,
            run.checkpoint_dir,
            root / "initial",
            self.training,
            root / "plan",
            device="cpu",
            dtype="float32",
        )

    def start(self, callbacks: Sequence[Any] = ()) -> TrainingSummary:
        return train_adapter(
            self.run.loaded,
            self.root / "initial",
            self.run.dataset_dir,
            self.root / "plan",
            self.training,
            self.root / "out",
            work_dir=self.root / "work",
            callbacks=callbacks,
        )

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.root / "out" / "adapter" / "adapter_model.safetensors")

    @property
    def metrics(self) -> list[dict[str, float]]:
        return [
            json.loads(line) for line in (self.root / "out" / "training" / "metrics.jsonl").read_text().splitlines()
        ]


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.found:
            parameters = adapter_parameters(model)
            self.found = {key: parameter.grad.clone() for key, parameter in parameters.items()}


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def first_gradients(run: Any, root: Path, lora: LoraConfig, **settings: Any) -> tuple[float, dict[str, torch.Tensor]]:
    training = Training(run, root, lora, max_steps=1, max_grad_norm=0, **settings)
    gradients = Gradients()
    training.start([gradients])
    return training.metrics[0]["loss"], gradients.found


def assert_same_gradients(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert set(left) == set(right)
    for key in left:
        torch.testing.assert_close(
            left[key], right[key], atol=atol, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


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


def fill(adapter_dir: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor.normal_(0, 0.1, generator=generator)
    save_file(tensors, adapter_dir / "adapter_model.safetensors", metadata={"format": "pt"})


def slow_reference(run: Any, root: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Row by row, without padding, with the model's full logits and torch's own cross-entropy."""
    import datasets

    rows = [row for batch in datasets.Dataset.from_file(str(root / "plan" / "batches.arrow")) for row in batch["rows"]]
    with attached(run.loaded, root / "initial", trainable=True) as model:
        losses, num_tokens = [], 0
        for row in rows:
            batch = batch_of(run.loaded, run.dataset_dir, "train", [row])
            labels = batch.pop("labels")[0, 1:]
            logits = model(**batch, use_cache=False).logits[0, :-1]
            kept = labels != -100
            losses.append(torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum"))
            num_tokens += int(kept.sum())
        loss = torch.stack(losses).sum() / num_tokens
        loss.backward()
        return loss.item(), {key: parameter.grad.clone() for key, parameter in adapter_parameters(model).items()}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("checkpointing", [True, False])
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
        base.model.language_model.layers[1].register_forward_hook(
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


@pytest.mark.parametrize("model_type", FAMILIES)
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


@pytest.mark.parametrize("model_type", FAMILIES)
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
    for line in training.metrics:
        if "loss" in line:
            assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "samples_per_second"} <= set(
                line
            )
    names = {path.name for path in (tmp_path / "out" / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "targets.json"}


@pytest.mark.parametrize("model_type", FAMILIES)
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


# Dropout makes the random state matter; a batch size that does not divide the rows makes the order matter.
RESUMED = {"max_steps": 4, "batch_size": 3, "gradient_accumulation": 2, "checkpoint_every_steps": 2}
DROPOUT = LoraConfig(rank=4, dropout=0.2)


@pytest.fixture(scope="module")
def uninterrupted(tiny_run: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Training]:
    done = {}
    for model_type in FAMILIES:
        lora = TINY[model_type].without_experts(DROPOUT)
        done[model_type] = Training(tiny_run(model_type), tmp_path_factory.mktemp("uninterrupted"), lora, **RESUMED)
        done[model_type].start()
    return done


class KilledError(Exception):
    pass


def kill() -> None:
    raise KilledError


@pytest.mark.parametrize("model_type", FAMILIES)
def test_resuming_after_a_kill_gives_the_same_bits(
    tiny_run: Callable, tmp_path: Path, uninterrupted: dict[str, Training], model_type: str
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
    assert training.weights.keys() == uninterrupted[model_type].weights.keys()
    for key, tensor in uninterrupted[model_type].weights.items():
        assert torch.equal(training.weights[key], tensor), key
    losses = [
        [(line["step"], line["loss"]) for line in done.metrics if "loss" in line]
        for done in (training, uninterrupted[model_type])
    ]
    assert losses[0] == losses[1]


def test_sigterm_stops_at_a_step_and_the_rest_gives_the_same_bits(
    tiny_run: Callable, tmp_path: Path, uninterrupted: dict[str, Training]
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
    for key, tensor in uninterrupted["qwen2_5_vl"].weights.items():
        assert torch.equal(training.weights[key], tensor), key


def test_a_finished_training_is_only_written_again(tiny_run: Callable, uninterrupted: dict[str, Training]) -> None:
    training = uninterrupted["qwen2_5_vl"]
    expected = training.weights
    summary = training.start()
    assert summary.resumed_from_step == summary.num_steps == 4
    assert all(torch.equal(training.weights[key], tensor) for key, tensor in expected.items())


def test_checkpoints_of_other_settings_are_not_resumed_from(
    tiny_run: Callable, tmp_path: Path, uninterrupted: dict[str, Training]
) -> None:
    shutil.copytree(uninterrupted["qwen2_vl"].root / "work", tmp_path / "work")
    training = Training(tiny_run("qwen2_vl"), tmp_path, DROPOUT, **(RESUMED | {"learning_rate": 1e-3, "max_steps": 1}))
    assert training.start().resumed_from_step is None


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
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


ALL_PARTS = LoraConfig(full_finetuning=("vision", "projector", "language"))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_full_finetuning_is_the_slow_reference_and_resumes_to_the_same_bits(
    tiny_run: Callable, tmp_path: Path, model_type: str
) -> None:
    if model_type == "deepseek_ocr2":
        pytest.xfail("a parameter of its tower takes no part in the output, so it has no gradient to compare")
    run = tiny_run(model_type)
    before = {name: parameter.clone() for name, parameter in run.loaded.model.named_parameters()}
    loss, gradients = first_gradients(run, tmp_path / "one", ALL_PARTS, batch_size=4, gradient_accumulation=1)
    expected_loss, expected = slow_reference(run, tmp_path / "one")
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert_same_gradients(gradients, expected)
    assert set(gradients) == set(before)

    resumed = RESUMED | {"vision_learning_rate": 1e-3}  # the optimiser's split groups come back as well
    whole = Training(run, tmp_path / "whole", ALL_PARTS, **resumed)
    whole.start()
    broken = Training(run, tmp_path / "broken", ALL_PARTS, **resumed)
    with pytest.raises(KilledError):
        broken.start([At(3, kill)])
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.loaded.model.named_parameters())
    assert broken.start().resumed_from_step == 2
    assert set(whole.weights) == set(before)
    for name, tensor in whole.weights.items():
        assert torch.equal(broken.weights[name], tensor), name
    moved = [name for name, tensor in whole.weights.items() if not torch.equal(tensor, before[name])]
    assert len(moved) > 0.9 * len(before)
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


class Rates(TrainerCallback):
    """Keeps the optimiser's groups."""

    def __init__(self) -> None:
        self.groups: list[tuple[float, float, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.groups = [
            (group["initial_lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups
        ]


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    "lora",
    [LoraConfig(rank=2, finetune_projector=True, modules_to_save=("lm_head",)), ALL_PARTS],
    ids=["adapter", "full"],
)
def test_each_part_learns_at_its_own_rate(
    tiny_run: Callable, tmp_path: Path, model_type: str, lora: LoraConfig
) -> None:
    if model_type == "deepseek_ocr2" and lora.full_finetuning:
        pytest.xfail("a parameter of its tower takes no part in the output, so it has no gradient to compare")
    run = tiny_run(model_type)
    rates = {"vision": 1e-4, "projector": 3e-4, "language": 1e-3}
    training = Training(
        run,
        tmp_path,
        lora,
        max_steps=1,
        batch_size=4,
        gradient_accumulation=1,
        schedule="constant",
        max_grad_norm=0,
        weight_decay=0.1,
        learning_rate=rates["language"],
        vision_learning_rate=rates["vision"],
        projector_learning_rate=rates["projector"],
    )
    if not lora.full_finetuning:
        fill(tmp_path / "initial")  # as long as B is zero, the gradient of A is
    gradients, seen = Gradients(), Rates()
    training.start([gradients, seen])
    assert {rate for rate, _, _ in seen.groups} == set(rates.values())
    assert seen.groups[0][0] == rates["language"]  # the one that is logged
    assert sum(count for _, _, count in seen.groups) == len(gradients.found)

    # By hand: one AdamW over three groups, told apart by what is written in the names.
    with attached(run.loaded, tmp_path / "initial", trainable=True) as model:
        parameters = {key: parameter.detach().clone() for key, parameter in adapter_parameters(model).items()}
    groups = []
    for key, tensor in parameters.items():
        is_projector = any(word in key for word in ("visual.merger", "projector", "image_newline", "view_sep"))
        towers = ("visual.", "vision_tower.", "vision_model.", "sam_model.", "qwen2_model.", "query_768", "query_1024")
        is_vision = any(word in key for word in towers)
        part = "projector" if is_projector else "vision" if is_vision else "language"
        tensor.grad = gradients.found[key]
        # Norms and biases are the ones with a single axis.
        groups.append({"params": [tensor], "lr": rates[part], "weight_decay": 0.1 if tensor.ndim > 1 else 0.0})
    torch.optim.AdamW(groups).step()
    for key, tensor in parameters.items():
        torch.testing.assert_close(training.weights[key], tensor, atol=1e-7, rtol=1e-6)


def test_a_rate_for_what_does_not_learn_is_refused(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    with pytest.raises(ConfigError, match=r"projector_learning_rate is 0\.0001 but nothing in the projector learns"):
        Training(run, tmp_path / "a", LoraConfig(rank=2), projector_learning_rate=1e-4)
    with pytest.raises(ConfigError, match=r"turn lora\.finetune_vision_layers on"):
        Training(run, tmp_path / "b", LoraConfig(full_finetuning=("language",)), vision_learning_rate=1e-4)


def test_whole_modules_learn(tiny_run: Callable, tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=("q_proj",), modules_to_save=("lm_head",))
    training = Training(tiny_run("qwen2_vl"), tmp_path, lora, max_steps=2, batch_size=4, gradient_accumulation=1)
    training.start()
    initial = load_file(tmp_path / "initial" / "adapter_model.safetensors")
    key = "base_model.model.lm_head.weight"
    assert (training.weights[key] - initial[key]).abs().max() > 1e-3


def test_learning_rate_follows_the_schedule(tiny_run: Callable, tmp_path: Path) -> None:
    rates = {}
    for schedule in ("linear", "cosine", "constant"):
        training = Training(
            tiny_run("qwen2_5_vl"),
            tmp_path / schedule,
            LoraConfig(rank=1, finetune_vision_layers=False),
            max_steps=4,
            batch_size=1,
            gradient_accumulation=1,
            learning_rate=1e-3,
            warmup_fraction=0.5,
            schedule=schedule,
        )
        training.start()
        rates[schedule] = [round(line["learning_rate"] * 1e3, 6) for line in training.metrics if "loss" in line]
    assert rates["linear"] == [0, 0.5, 1, 0.5]
    assert rates["cosine"] == [0, 0.5, 1, 0.5]
    assert rates["constant"] == [0, 0.5, 1, 1]


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
