"""Fused pieces in live models of every family: the same numbers, less kept, and nothing left behind."""

from __future__ import annotations

import copy
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm.kernels
from tests.support.tiny_models import TINY
from tests.support.tiny_runs import batch_of
from vlm.config import LoraConfig
from vlm.families import FAMILIES
from vlm.kernels import activation
from vlm.kernels.install import fused
from vlm.kernels.rotary import rotary
from vlm.lora.attach import attached
from vlm.lora.build import build_adapter
from vlm.lora.peft_model import adapter_parameters, base_model


def spread(model: Any) -> None:
    """Moves the matrices B away from zero, where the gradient of A would be zero too."""
    generator = torch.Generator().manual_seed(0)
    for key, parameter in adapter_parameters(model).items():
        if "lora_B" in key:
            parameter.data.normal_(0, 0.1, generator=generator)


def step(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    parameters = adapter_parameters(model)
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {key: parameter.grad.clone() for key, parameter in parameters.items()}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_whole_models(
    tiny_run: Callable, tmp_path: Path, model_type: str, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str | None] = []

    def watched(*args: Any, name: str | None, **kwargs: Any) -> None:
        names.append(name)
        activation.activate(*args, name=name, **kwargs)

    monkeypatch.setattr("vlm.kernels.mlp.activate", watched)
    # Rotary embedding is fused where Triton runs alone; here its plain operations stand in for the kernel.
    monkeypatch.setattr("vlm.kernels.install.use_triton", lambda x: True)
    rotations: list[bool] = []

    def rotated(*args: Any, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
        rotations.append(interleaved)
        return rotary(*args, interleaved=interleaved)

    monkeypatch.setattr("vlm.kernels.rotary_install.rotary", rotated)
    run = tiny_run(model_type, quantization)
    lora = TINY[model_type].possible(LoraConfig(rank=4, finetune_projector=True))
    build_adapter(run.loaded, lora, tmp_path / "adapter")
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1, 2])
    with attached(run.loaded, tmp_path / "adapter", trainable=True) as model:
        spread(model)
        model.train()
        before = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
        loss, gradients = step(model, batch)
        with fused(base_model(model), run.loaded.family) as report:
            found_loss, found = step(model, batch)
        assert before == {name: module.__dict__.get("forward") for name, module in model.named_modules()}
        model.eval()
    # float32 sums in another order, through a handful of layers.
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert set(found) == set(gradients)
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=2e-6 * max(1.0, float(gradient.abs().max())))
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())

    num_layers = len({key for key in gradients if "lora_A" in key})
    layers = [
        name
        for name, _ in run.loaded.model.named_modules()
        if re.fullmatch(f"{run.loaded.family.language_layer}|{run.loaded.family.vision_layer}", name)
    ]
    # Experts are adapted in another way, and are no linear layers.
    experts = sum("experts" in key and "shared" not in key for key in gradients if "lora_A" in key)
    assert report.fused["linear"] == num_layers - experts
    # Gemma's RMSNorms multiply by one more than their weight, and stay with transformers.
    stock = [module for module in run.loaded.model.modules() if type(module) is torch.nn.LayerNorm]
    assert report.fused["norm"] >= 4 + len(stock) if model_type != "gemma3" else report.fused["norm"] == len(stock)
    # Functions of files: one at least for the language model, whose layers call it.
    assert report.fused["rotary"] >= 1
    assert rotations
    # GLM's language model alone rotates neighbours; its tower rotates halves.
    assert set(rotations) == ({False, True} if model_type == "glm_ocr" else {False})
    assert not report.left
    # Every layer has one block; a layer of experts has them shared. Where gate and up projection are joined, only their
    # linear layers are fused.
    joined = [key for key in gradients if key.endswith("mlp.gate_up_proj.lora_A.weight")]
    assert len(joined) == (2 if model_type == "glm_ocr" else 0)
    assert report.fused["mlp"] == len(layers) - len(joined)
    # Every activation is one that a kernel knows; forward, and again in the backward pass.
    assert None not in names
    assert len(names) >= 2 * report.fused["mlp"]


def test_the_kernels_of_activations_are_called(
    tiny_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Triton runs, the blocks of a model from transformers go through its kernels."""
    calls: list[tuple[str, str]] = []

    def forward(inner: torch.Tensor, name: str, *, gated: bool, out: torch.Tensor) -> None:
        calls.append(("forward", name))
        assert gated
        g, u = inner.chunk(2, 1)
        torch.mul(torch.nn.functional.silu(g), u, out=out)

    def backward(inner: torch.Tensor, name: str, *, gated: bool, gradient: torch.Tensor) -> None:
        calls.append(("backward", name))

    kernels = types.ModuleType("vlm.kernels.activation_triton")
    kernels.forward, kernels.backward = forward, backward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vlm.kernels.activation_triton", kernels)
    monkeypatch.setattr(vlm.kernels, "activation_triton", kernels, raising=False)
    run = tiny_run("qwen2_5_vl")
    build_adapter(run.loaded, LoraConfig(rank=4), tmp_path)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0])
    with attached(run.loaded, tmp_path, trainable=True) as model:
        spread(model)
        model.train()
        monkeypatch.setattr(activation, "use_triton", lambda x: True)
        with fused(base_model(model), run.loaded.family, ["mlp"]) as report:
            step(model, batch)
        model.eval()
    num_blocks = report.fused["mlp"]
    assert num_blocks
    assert calls.count(("forward", "silu")) == 2 * num_blocks
    assert calls.count(("backward", "silu")) == num_blocks


def test_what_stays_with_peft(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    cases = {
        "dropout": (run, LoraConfig(rank=2, dropout=0.1)),
        "DoRA or another variant": (run, LoraConfig(rank=2, use_dora=True)),
        "base is Linear8bitLt": (tiny_run("qwen2_5_vl", "int8"), LoraConfig(rank=2)),
    }
    for reason, (found, lora) in cases.items():
        build_adapter(found.loaded, lora, tmp_path / reason)
        with (
            attached(found.loaded, tmp_path / reason, trainable=True) as model,
            fused(base_model(model), found.loaded.family) as report,
        ):
            pass
        assert set(report.left) == {reason}
        assert report.fused["linear"] == report.fused["mlp"] == 0
        assert reason in str(report)


def test_a_norm_that_learns_is_left_alone(tiny_run: Callable) -> None:
    run = tiny_run("qwen2_5_vl")
    model = copy.deepcopy(run.loaded.model).requires_grad_(True)
    with fused(model, run.loaded.family) as report:
        assert report.fused.total() == 0


def test_a_disabled_adapter_is_the_base(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    build_adapter(run.loaded, LoraConfig(rank=4), tmp_path)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0])
    with torch.no_grad():
        expected = run.loaded.model(**batch).logits
        with attached(run.loaded, tmp_path, trainable=True) as model, fused(base_model(model), run.loaded.family):
            spread(model)
            adapted = model(**batch).logits
            with model.disable_adapter():
                found = model(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (adapted - expected).abs().max() > 1e-2


def test_only_the_chosen_pieces(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    build_adapter(run.loaded, LoraConfig(rank=2), tmp_path)
    with attached(run.loaded, tmp_path, trainable=True) as model:
        for piece in ("linear", "mlp", "norm"):
            with fused(base_model(model), run.loaded.family, [piece]) as report:
                assert set(report.fused) == {piece}
