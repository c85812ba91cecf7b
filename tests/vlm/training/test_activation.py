"""The choice of what is recomputed, the estimate of what layers keep against a count, and recomputation itself."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.packing_rows import packing_collator, packing_rows, pages
from tests.support.tiny_models import TINY
from tests.support.tiny_runs import batch_of
from vlm.config import LoraConfig, TrainingConfig
from vlm.families import FAMILIES, Family
from vlm.kernels.install import fused
from vlm.lora.attach import attached
from vlm.lora.build import build_adapter
from vlm.lora.peft_model import adapter_parameters, base_model
from vlm.packing import attention
from vlm.packing.model import packed
from vlm.training.activation import ActivationPlan, choose_activations
from vlm.training.memory import Tower, _cross_bytes, towers
from vlm.training.recompute import recomputed


def choose(
    mode: Any, memory: int | None, *, num_vision_layers: int = 4, embedding_bytes: int = 0, **graphs: bool
) -> ActivationPlan:
    """With ten tokens of vision and of language, one byte a value."""
    vision, language = Tower(4, 8, 16, 8), Tower(6, 16, 64, 16)

    def expected(plan: ActivationPlan) -> int:
        parts = ((vision, plan.recomputed_vision), (language, plan.recomputed_language))
        layers = sum(sum(t.activation_bytes(10, 1, num_recomputed=n, offload=plan.offload)) for t, n in parts)
        pool = 500 if plan.cuda_graphs else 0
        return int(layers) + pool + (0 if plan.embedding_on_host else embedding_bytes)

    seen[:] = [
        expected(ActivationPlan(0, 0)),
        expected(ActivationPlan(None, None)),
        expected(ActivationPlan(None, None, True)),
    ]
    plan = choose_activations(
        mode,
        num_vision_layers=num_vision_layers,
        num_language_layers=6,
        expected_bytes=expected,
        device_memory_bytes=memory,
        embedding_can_move=embedding_bytes > 0,
        **graphs,
    )
    seen.append(expected(plan))
    return plan


seen: list[int] = []


def test_modes_and_frozen_towers() -> None:
    assert choose("keep", 1) == ActivationPlan(0, 0)
    assert choose("recompute", 10**9) == ActivationPlan(None, None)
    assert choose("recompute", 10**9, num_vision_layers=0) == ActivationPlan(0, None)
    assert choose("offload", 10**9) == ActivationPlan(None, None, offload=True)
    assert choose("auto", None) == ActivationPlan(0, 0)
    assert choose("auto", None, embedding_bytes=3 << 30) == ActivationPlan(None, None)


def test_auto_recomputes_as_little_as_fits() -> None:
    choose("keep", 1)
    keep, recompute, offload = seen[:3]
    assert keep > recompute > offload
    assert choose("auto", 2 * keep) == ActivationPlan(0, 0)
    assert choose("auto", 1) == ActivationPlan(None, None, offload=True)
    plans = []
    for memory in range(int(offload / 0.9) + 1, int(keep / 0.9) + 2, 20):
        plans.append(choose("auto", memory))
        assert seen[3] <= 0.9 * memory
    amounts = [
        (4 if plan.recomputed_vision is None else plan.recomputed_vision)
        + (6 if plan.recomputed_language is None else plan.recomputed_language)
        for plan in plans
    ]
    assert amounts == sorted(amounts, reverse=True)
    # The vision tower goes first, and there is a middle way.
    assert any(plan.recomputed_vision is None and plan.recomputed_language in range(1, 6) for plan in plans)
    assert all(plan.recomputed_vision is None for plan in plans if plan.recomputed_language != 0)


def test_the_embedding_moves_before_anything_is_recomputed() -> None:
    own = {"embedding_bytes": 1000}
    assert choose("keep", 1, **own) == ActivationPlan(0, 0)
    keep, recompute = seen[:2]
    assert choose("recompute", 10**9, **own) == ActivationPlan(None, None)
    assert choose("offload", 10**9, **own) == ActivationPlan(None, None, offload=True, embedding_on_host=True)
    assert choose("auto", None, **own) == ActivationPlan(0, 0)
    assert choose("auto", 2 * keep, **own) == ActivationPlan(0, 0)
    assert choose("auto", int(keep / 0.9) - 1, **own) == ActivationPlan(0, 0, embedding_on_host=True)
    less = choose("auto", int((keep - 1100) / 0.9), **own)
    assert less.embedding_on_host
    assert less.recomputed_vision != 0
    assert choose("auto", int((recompute - 999) / 0.9), **own).embedding_on_host
    assert choose("auto", 1, **own) == ActivationPlan(None, None, offload=True, embedding_on_host=True)


def test_graphs_only_where_there_is_room() -> None:
    choose("keep", 1)
    keep, recompute, offload = seen[:3]
    for mode, plan, least in (
        ("keep", ActivationPlan(0, 0), keep),
        ("recompute", ActivationPlan(None, None), recompute),
    ):
        for launch_bound in (False, True):
            own = {"graphs": True, "launch_bound": launch_bound}
            enough = int((least + 500) / 0.9) + 1
            assert choose(mode, enough, **own) == dataclasses.replace(plan, cuda_graphs=True)
            assert choose(mode, enough - 2, **own) == plan
            assert choose(mode, enough, launch_bound=launch_bound) == plan
    assert not choose("offload", 10**9, graphs=True, launch_bound=True).cuda_graphs
    # What is kept without graphs would not fit with them.
    memory = int((keep + 100) / 0.9)
    assert choose("auto", memory, graphs=True) == ActivationPlan(0, 0)
    # Where launches are what takes time, layers make room for graphs.
    plan = choose("auto", memory, graphs=True, launch_bound=True)
    assert plan.cuda_graphs
    assert plan.recomputed_vision != 0
    assert choose("auto", 2 * keep + 1000, graphs=True) == ActivationPlan(0, 0, cuda_graphs=True)
    # Without room for them even so, all is as if there were none.
    for memory in range(int(offload / 0.9) + 1, int((recompute + 499) / 0.9), 100):
        assert choose("auto", memory, graphs=True, launch_bound=True) == choose("auto", memory)


def test_the_older_name() -> None:
    assert TrainingConfig(gradient_checkpointing=True).activation_memory == "recompute"
    assert TrainingConfig(gradient_checkpointing=False).activation_memory == "keep"
    with pytest.raises(ValueError, match="older name"):
        TrainingConfig(gradient_checkpointing=True, activation_memory="keep")
    with pytest.raises(ValueError, match="'recompute' for true"):
        TrainingConfig(gradient_checkpointing="yes")


def kept_values(base: Any, family: Family, call: Callable[[], Any]) -> dict[str, float]:
    """Values per position that each layer's way forward keeps and none before it did, weights left out."""
    counted: dict[str, float] = {}
    known = {parameter.untyped_storage().data_ptr() for parameter in base.parameters()}
    alive = []

    def count(name: str, forward: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        num_bytes = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal num_bytes
            storage = tensor.untyped_storage()
            # Of one column are B, which is no part of what a position needs, and x Aᵀ, which is a few values of it.
            if storage.data_ptr() not in known and tensor.shape[-1] != 1:
                known.add(storage.data_ptr())
                alive.append(storage)  # so that its address is not given to another
                num_bytes += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = forward(hidden, *args, **kwargs)
        counted[name] = num_bytes / (hidden.numel() / hidden.shape[-1]) / hidden.element_size()
        return output

    layers = [
        (name, module)
        for name, module in base.named_modules()
        if re.fullmatch(f"{family.language_layer}|{family.vision_layer}", name)
    ]
    for name, module in layers:
        module.forward = partial(count, name, module.forward)
    try:
        call()
    finally:
        for _, module in layers:
            del module.forward
    return counted


class Kernel(torch.autograd.Function):
    """What the kernel for segments keeps, and no numbers."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(("size", "least", "most"), [((112, 112), 0.6, 1.0), ((56, 112), 0.75, 1.1)])
def test_estimate_of_cross_attention_against_a_count(
    tiny_run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    least: float,
    most: float,
) -> None:
    """The estimate is for pages that take copies of keys and values; without them there is a third less to keep."""

    def varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> torch.Tensor:
        output: torch.Tensor = Kernel.apply(*(own.squeeze(0).transpose(0, 1) for own in (query, key, value)))
        return output[None]

    # As on a GPU: the other way repeats keys for each group of queries.
    monkeypatch.setattr(attention, "takes_varlen", lambda query: True)
    monkeypatch.setattr(attention, "_varlen", varlen)
    run = tiny_run("mllama")
    family = run.loaded.family
    build_adapter(run.loaded, LoraConfig(rank=1), tmp_path)
    batch = packing_collator(run.loaded).pack(packing_rows(run.loaded.processing, pages(size)))
    with attached(run.loaded, tmp_path, trainable=True) as model, fused(base_model(model), family):
        base = base_model(model.train())
        with packed(base, family):
            counted = kept_values(base, family, lambda: model(**batch, use_cache=False))
        model.eval()
    config = base.config.to_dict()
    language = towers(config, family)[0]
    assert family.cross_attention is not None
    cross = family.cross_attention(config)
    (number,) = cross.layers
    num_tokens = batch["input_ids"].numel()
    # A class token beside each tile's patches; without the padding of the tower's rows, which does not reach this layer.
    num_positions = batch["pixel_values"].shape[1] * 4 * (config["vision_config"]["image_size"] ** 2 // 14**2 + 1)
    kept, recomputed_too = (
        _cross_bytes(cross, language, num_tokens, num_positions, 1, count)[0] for count in (0, None)
    )
    # The features themselves, which the layer is the first to keep.
    features = num_positions * language.hidden / num_tokens
    found = counted[f"model.language_model.layers.{number}"] - features
    estimated = language.kept_values(fused=True) + (kept - recomputed_too) / num_tokens
    assert least * estimated < found < most * estimated, (found, estimated, language.kept_values(fused=True))


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_estimate_of_what_layers_keep_against_a_count(tiny_run: Callable, tmp_path: Path, model_type: str) -> None:
    run = tiny_run(model_type)
    family = run.loaded.family
    build_adapter(run.loaded, LoraConfig(rank=1), tmp_path)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0])
    del batch["attention_mask"]  # one row: without a mask of [tokens, tokens], as on a GPU
    with attached(run.loaded, tmp_path, trainable=True) as model, fused(base_model(model), family):
        counted = kept_values(base_model(model.train()), family, lambda: model(**batch, use_cache=False))
    config = json.loads((run.checkpoint_dir / "model" / "config.json").read_text())
    language, vision, _ = towers(config, family)
    # The first layer of each tower also counts what all share, such as positions.
    assert counted["model.language_model.layers.1"] == pytest.approx(language.kept_values(fused=True), rel=0.1)
    assert counted["model.visual.blocks.1"] == pytest.approx(vision.kept_values(fused=True), rel=0.1)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_recomputed_and_offloaded_gradients_are_the_kept_ones(
    tiny_run: Callable, tmp_path: Path, model_type: str
) -> None:
    run = tiny_run(model_type)
    build_adapter(run.loaded, TINY[model_type].without_experts(LoraConfig(rank=2, dropout=0.1)), tmp_path)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1])
    plans = {
        "keep": ActivationPlan(0, 0),
        "some": ActivationPlan(1, 1),
        "all": ActivationPlan(None, None),
        "offload": ActivationPlan(None, None, offload=True),
    }
    found: dict[str, dict[str, torch.Tensor]] = {}
    with attached(run.loaded, tmp_path, trainable=True) as model:
        model.train()
        own = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
        for key, parameter in adapter_parameters(model).items():
            if "lora_B" in key:
                parameter.data.fill_(0.01)
        for name, plan in plans.items():
            torch.manual_seed(0)  # of dropout, which is drawn again alike
            model.zero_grad()
            with recomputed(base_model(model), run.loaded.family, plan, min_offloaded=1):
                model(**batch, use_cache=False).loss.backward()
            found[name] = {key: parameter.grad.clone() for key, parameter in adapter_parameters(model).items()}
        assert own == {name: module.__dict__.get("forward") for name, module in model.named_modules()}
        model.eval()
    for name in plans:
        for key, gradient in found["keep"].items():
            # The very same operations on the very same numbers.
            assert torch.equal(found[name][key], gradient), (name, key)


def test_offloading_leaves_no_input_behind(tiny_run: Callable, tmp_path: Path) -> None:
    """What is kept between the passes is the host's copies; the layers' inputs themselves are gone."""
    import gc
    import weakref

    run = tiny_run("qwen2_5_vl")
    build_adapter(run.loaded, LoraConfig(rank=2), tmp_path)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0])
    inputs: list[weakref.ref[torch.Tensor]] = []
    alive = {}
    with attached(run.loaded, tmp_path, trainable=True) as model:
        base = base_model(model.train())
        layer = base.model.language_model.layers[1]
        hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
        for offload in (False, True):
            inputs.clear()
            with recomputed(base, run.loaded.family, ActivationPlan(None, None, offload), min_offloaded=1):
                loss = model(**batch, use_cache=False).loss
            gc.collect()
            alive[offload] = len(inputs) == 1 and inputs[0]() is not None
            loss.backward()
        hook.remove()
        model.eval()
    # Autograd keeps the tensor itself where nothing is offloaded.
    assert not alive[True]
