"""Whole trainings of tiny models through our own trainer, what happens inside them, and a slow reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tests.support.tiny_runs import batch_of
from vlm.config import DistributedConfig, EvaluationConfig, GenerationConfig, LoraConfig, TrainingConfig
from vlm.lora.attach import attached
from vlm.lora.build import build_adapter
from vlm.lora.peft_model import adapter_parameters
from vlm.training.distributed.job import Job
from vlm.training.plan import make_plan
from vlm.training.train import TrainingSummary, train_adapter

# A batch size that does not divide the rows makes their order matter.
RESUMED = {"max_steps": 4, "batch_size": 3, "gradient_accumulation": 2, "checkpoint_every_steps": 2}
# Steps of three and, at the end, of one row: then a process of two has none. Every fourth row has no image.
UNEVEN = {"epochs": 2.0, "batch_size": 3, "gradient_accumulation": 1, "evaluate_every_steps": 3}
FIVE = ("qwen2_vl", "qwen2_5_vl", "mllama", "pixtral", "deepseek_ocr")
ALL_PARTS = LoraConfig(full_finetuning=("vision", "projector", "language"))
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
            device=run.loaded.device,
            dtype=run.loaded.dtype,
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

    def job(self, root: Path, **distributed: Any) -> Job:
        """The same training for several processes, with folders of its own under `root`."""
        root.mkdir(parents=True, exist_ok=True)
        several = DistributedConfig(**({"num_processes": 2} | distributed))
        return Job(
            checkpoint_dir=self.run.checkpoint_dir,
            digest=None,
            adapter_dir=self.root / "initial",
            dataset_dir=self.run.dataset_dir,
            plan_dir=self.root / "plan",
            output_dir=root / "out",
            work_dir=root / "work",
            events_dir=root / "events",
            device=self.run.loaded.device,
            num_processes=several.num_processes,
            training=self.training.model_copy(update={"distributed": several}),
            generation=GenerationConfig(),
            evaluation=EvaluationConfig(),
        )

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.root / "out" / "adapter" / "adapter_model.safetensors")

    @property
    def metrics(self) -> list[dict[str, float]]:
        return [
            json.loads(line) for line in (self.root / "out" / "training" / "metrics.jsonl").read_text().splitlines()
        ]


def assert_same(single: Training, job: Job) -> None:
    """Compares what came out."""
    lines = [json.loads(line) for line in (job.output_dir / "training" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in single.metrics]
    for own, other in zip(lines, single.metrics, strict=True):
        # Sums of float32 terms in another order; the norm tells a wrong scale, which AdamW's steps do not show.
        for name in {"loss", "eval_loss", "grad_norm", "mean_token_accuracy"} & set(other):
            assert own[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)
    found = load_file(job.output_dir / "adapter" / "adapter_model.safetensors")
    files = job.adapter_dir / "adapter_model.safetensors"
    initial = load_file(files) if files.is_file() else {}
    assert set(found) == set(single.weights)
    for name, tensor in single.weights.items():
        # AdamW divides by the gradient's own size, so where that is all rounding (biases of keys), a step of 5e-3 is, too:
        # no value is off by more than one, and on average they are by less than a hundredth of the way travelled.
        difference = (found[name] - tensor).abs()
        assert difference.max() < 5e-3, name
        assert difference.mean() < 1e-4, name
        if name in initial:
            assert not torch.equal(found[name], initial[name]), name


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step, of what has one."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.found:
            parameters = adapter_parameters(model)
            self.found = {
                key: parameter.grad.clone() for key, parameter in parameters.items() if parameter.grad is not None
            }


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


def fill(adapter_dir: Path) -> None:
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
        return loss.item(), {
            key: parameter.grad.clone()
            for key, parameter in adapter_parameters(model).items()
            if parameter.grad is not None
        }


class KilledError(Exception):
    pass


def kill() -> None:
    raise KilledError
