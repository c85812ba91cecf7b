"""Training on packs against training on padded batches, and what happens when memory runs out."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.rerun import Rerun
from tests.support.tiny_training import Training, fill
from vlm.config import LoraConfig
from vlm.errors import ResourceError
from vlm.lora.build import build_adapter
from vlm.training import capture, train
from vlm.training.capture import Stack
from vlm.training.plan import read_plan
from vlm.training.shrinking import Shrinking


def trained(run: Any, root: Path, initial: Path, **settings: Any) -> Training:
    root.mkdir()
    shutil.copytree(initial, root / "initial")
    training = Training(run, root, LoraConfig(rank=2), max_steps=3, **settings)
    training.start()
    return training


def losses(training: Training) -> list[float]:
    return [line["loss"] for line in training.metrics if "loss" in line]


@pytest.fixture
def initial(tiny_run: Callable, tmp_path: Path) -> Callable[[str], Path]:
    def make(model_type: str) -> Path:
        build_adapter(tiny_run(model_type).loaded, LoraConfig(rank=2, seed=3), tmp_path / "start")
        fill(tmp_path / "start")
        return tmp_path / "start"

    return make


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "mllama"])
def test_three_steps_packed_and_padded(tiny_run: Callable, initial: Callable, tmp_path: Path, model_type: str) -> None:
    run, start = tiny_run(model_type), initial(model_type)
    settings = {"batch_size": 2, "gradient_accumulation": 3, "learning_rate": 1e-3}
    padded = trained(run, tmp_path / "padded", start, packing=False, **settings)
    assert not read_plan(padded.root / "plan").packing
    for name, limit in (("packed", None), ("small", 70)):
        packs = trained(run, tmp_path / name, start, max_tokens_per_pack=limit, **settings)
        assert read_plan(packs.root / "plan").packing
        # Gradients differ by 1e-6 relative. Adam's first steps go by their signs, so rounding shows in the weights only where
        # a gradient is about zero: below 1e-4 of the squared way that all went.
        assert losses(packs) == pytest.approx(losses(padded), abs=2e-5)
        moved = difference = 0.0
        for key, tensor in padded.weights.items():
            difference += float((packs.weights[key] - tensor).square().sum())
            moved += float((tensor - _start(start)[key]).square().sum())
        assert difference < 1e-4 * moved


def _start(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_steps_of_a_number_of_tokens(tiny_run: Callable, initial: Callable, tmp_path: Path) -> None:
    run, start = tiny_run("qwen2_5_vl"), initial("qwen2_5_vl")
    training = trained(run, tmp_path / "run", start, tokens_per_step=200, max_tokens_per_pack=100)
    plan = read_plan(training.root / "plan")
    assert (plan.num_steps, plan.num_micro_batches, plan.max_tokens_per_pack) == (3, 6, 100)
    assert len(losses(training)) == 3


class OutOfMemory:
    """Stands for a GPU that holds only so many tokens."""

    def __init__(self, model: torch.nn.Module, most: int) -> None:
        self.most, self.seen = most, []
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tokens = kwargs["input_ids"].numel()
        self.seen.append(tokens)
        if tokens > self.most and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no memory for this pack")


def test_out_of_memory_halves_the_packs_and_goes_on(
    tiny_run: Callable, initial: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, start = tiny_run("qwen2_5_vl"), initial("qwen2_5_vl")
    settings = {"batch_size": 4, "gradient_accumulation": 1, "log_every_steps": 1}
    whole = trained(run, tmp_path / "whole", start, **settings)
    largest = read_plan(whole.root / "plan").largest_micro_batch_tokens
    memory = OutOfMemory(run.loaded.model.model, int(0.7 * largest))
    try:
        halved = trained(run, tmp_path / "halved", start, **settings)
    finally:
        memory.handle.remove()
    assert max(memory.seen) > memory.most
    assert "going on with at most" in caplog.text
    # Once learnt, the limit holds for all further steps.
    assert sum(tokens > memory.most for tokens in memory.seen) == caplog.text.count("out of memory")
    assert losses(halved) == pytest.approx(losses(whole), abs=2e-5)


def test_out_of_memory_gives_up_graphs_first(
    tiny_run: Callable,
    initial: Callable,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, start = tiny_run("qwen2_5_vl"), initial("qwen2_5_vl")
    settings = {"batch_size": 4, "gradient_accumulation": 1, "log_every_steps": 1}
    whole = trained(run, tmp_path / "whole", start, **settings)
    stacks = Stack(Rerun), Stack(Rerun)
    stacks[0].companions, stacks[1].companions = [stacks[1]], [stacks[0]]
    monkeypatch.setattr(capture, "graph_stacks", lambda *args, **kwargs: stacks)
    planned = train.read_plan
    monkeypatch.setattr(
        train,
        "read_plan",
        lambda folder: dataclasses.replace(
            planned(folder), activations=planned(folder).activations | {"cuda_graphs": True}
        ),
    )
    seen = []

    def full(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Behind the vision tower, while its layers wait for their way back.
        seen.append(any(stack.has_graphs for stack in stacks))
        if len(seen) == 2:
            raise torch.OutOfMemoryError("graphs and all else do not fit")

    handle = run.loaded.model.model.language_model.norm.register_forward_pre_hook(full, with_kwargs=True)
    try:
        without = trained(run, tmp_path / "without", start, **settings)
    finally:
        handle.remove()
    # Every step in one pack, the second twice.
    assert seen[:4] == [True, True, False, False]
    assert "going on without CUDA graphs" in caplog.text
    assert "going on with at most" not in caplog.text
    assert losses(without) == pytest.approx(losses(whole), abs=2e-5)


def test_a_single_row_that_does_not_fit_ends_the_training(
    tiny_run: Callable, initial: Callable, tmp_path: Path
) -> None:
    run, start = tiny_run("qwen2_5_vl"), initial("qwen2_5_vl")
    memory = OutOfMemory(run.loaded.model.model, 10)
    try:
        with pytest.raises(ResourceError, match=r"row \d of the training split, with \d+ tokens, does not fit"):
            trained(run, tmp_path / "run", start)
    finally:
        memory.handle.remove()


def test_shrinking_by_hand() -> None:
    shrinking = Shrinking(np.array([10, 30, 20, 40]))
    rows: Sequence[Sequence[int]] = [[0, 1, 2, 3], [2]]
    assert shrinking.parts(rows) == [[0, 1, 2, 3], [2]]
    shrinking.halve([0, 1, 2, 3], 0)
    # 40 + 20 against 30 + 10; the first half is over 50 still.
    assert shrinking.parts(rows) == [[3], [2], [0, 1], [2]]
    with pytest.raises(ResourceError, match="row 3 of the training split, with 40 tokens"):
        shrinking.halve([3], 0)
