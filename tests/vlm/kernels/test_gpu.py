"""Fused pieces on a GPU, in bfloat16 over NF4: near the float32 result, with less memory, and offloaded alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device

from tests.support.tiny_models import make_tiny_checkpoint
from tests.support.tiny_runs import batch_of, mixed_rows, write_dataset
from vlm.config import LoraConfig, ModelConfig
from vlm.families import FAMILIES
from vlm.kernels.frozen_linear import Projection
from vlm.kernels.head_loss import head_loss, head_loss_eager
from vlm.kernels.install import fused
from vlm.kernels.limits import HEAD_CHUNK_BYTES, HEAD_COPIES
from vlm.kernels.lora_linear import lora_linear, lora_linear_eager
from vlm.kernels.mlp import Adapted, mlp, mlp_eager
from vlm.lora.peft_model import adapter_parameters, base_model
from vlm.training.activation import ActivationPlan
from vlm.training.recompute import recomputed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def adapted(inputs: int, outputs: int, *, rank: int = 16) -> Adapted:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(inputs, outputs, compute_dtype=torch.bfloat16, quant_type="nf4").cuda()
    layer.requires_grad_(False)
    a, b = (
        torch.randn(*shape, device="cuda").mul_(0.1).requires_grad_() for shape in ((rank, inputs), (outputs, rank))
    )
    return Projection(layer, 0.5), a, b


def close(found: torch.Tensor, expected: torch.Tensor, bound: float = 2e-2) -> None:
    """As vectors: single values of a sum of terms rounded to 8 bits may be anywhere."""
    assert (found.float() - expected.float()).norm() <= bound * expected.float().norm()


# A width that is no multiple of 8 is padded inside of the block.
@pytest.mark.parametrize("width", [320, 340])
@pytest.mark.parametrize("num_rows", [1, 77, 513])
def test_projections_in_bfloat16(num_rows: int, width: int) -> None:
    torch.manual_seed(0)
    up, down, gate = adapted(256, width), adapted(width, 256), adapted(256, width)
    x = torch.randn(num_rows, 256, device="cuda", requires_grad=True)
    act = torch.nn.SiLU()
    matrices = [matrix for layer in (up, down, gate) for matrix in layer[1:]]
    cases: list[tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor], list[Any]]] = [
        (lambda: lora_linear(x, *up), lambda: lora_linear_eager(x, *up), [x, *up[1:]]),
        (lambda: mlp(x, up, down, gate, act), lambda: mlp_eager(x, up, down, gate, act), [x, *matrices]),
    ]
    for function, eager, inputs in cases:
        with torch.autocast("cuda", torch.bfloat16):
            found = function()
        assert found.dtype == torch.bfloat16
        expected = eager()  # in float32
        close(found, expected)
        for one, other in zip(
            torch.autograd.grad(found.float().square().sum(), inputs),
            torch.autograd.grad(expected.square().sum(), inputs),
            strict=True,
        ):
            assert one.dtype == other.dtype
            close(one, other, 4e-2)


@pytest.mark.parametrize("num_rows", [1, 700])
def test_head_in_bfloat16(num_rows: int) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(256, 151936, bias=False, device="cuda").requires_grad_(False)
    h = torch.randn(num_rows, 256, device="cuda", requires_grad=True)
    targets = torch.randint(0, 151936, (num_rows,), device="cuda")
    expected, _ = head_loss_eager(h, head, targets)
    (wanted,) = torch.autograd.grad(expected, h)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    narrow = torch.nn.Linear(256, 151936, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    narrow.weight.data.copy_(head.weight)
    before = torch.cuda.memory_allocated()
    found, _ = head_loss(h.bfloat16(), narrow, targets)
    # Chunks and their copies, and a workspace of the matrix products; not 700 rows of logits several times over.
    assert torch.cuda.max_memory_allocated() - before < HEAD_COPIES * HEAD_CHUNK_BYTES + 64 * 2**20
    (gradient,) = torch.autograd.grad(found, h)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    close(gradient, wanted, 1e-2)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_whole_models_in_bfloat16(tmp_path: Path, model_type: str) -> None:
    from vlm.loading.build import build_checkpoint
    from vlm.loading.checkpoint import load_checkpoint
    from vlm.lora.attach import attached
    from vlm.lora.build import build_adapter

    source = make_tiny_checkpoint(model_type, tmp_path / "source")
    build_checkpoint(
        ModelConfig(name=str(source), quantization="nf4"), tmp_path / "checkpoint", device="cuda", dtype="bfloat16"
    )
    loaded = load_checkpoint(tmp_path / "checkpoint", device="cuda")
    dataset = write_dataset(tmp_path / "dataset", loaded.processing, {"train": mixed_rows(4)})
    build_adapter(loaded, LoraConfig(rank=8), tmp_path / "adapter")
    batch = send_to_device(batch_of(loaded, dataset, "train", [0, 1, 2]), "cuda")
    everything, offloaded = ActivationPlan(None, None), ActivationPlan(None, None, offload=True)
    settings: dict[str, tuple[tuple[str, ...] | None, ActivationPlan]] = {
        "eager": (None, ActivationPlan(0, 0)),
        "fused": (("linear", "mlp", "norm", "rotary"), ActivationPlan(0, 0)),
        "recomputed": (("linear", "mlp", "norm", "rotary"), everything),
        "offloaded": (("linear", "mlp", "norm", "rotary"), offloaded),
    }
    losses, gradients = {}, {}
    with attached(loaded, tmp_path / "adapter", trainable=True) as model:
        model.train()
        generator = torch.Generator("cuda").manual_seed(0)
        for key, parameter in adapter_parameters(model).items():
            if "lora_B" in key:
                parameter.data.normal_(0, 0.1, generator=generator)
        for name, (pieces, plan) in settings.items():
            model.zero_grad()
            with (
                fused(base_model(model), loaded.family, pieces or ()) as report,
                recomputed(base_model(model), loaded.family, plan, min_offloaded=1),
                torch.autocast("cuda", torch.bfloat16),
            ):
                loss = model(**batch, use_cache=False).loss
                loss.backward()
            assert ("rotary" in report.fused) == bool(pieces and report.fused["rotary"])
            losses[name] = loss.item()
            gradients[name] = {key: p.grad.clone() for key, p in adapter_parameters(model).items()}
        model.eval()
    # The same numbers, moved away and back.
    assert losses["fused"] == losses["recomputed"] == losses["offloaded"]
    for key, gradient in gradients["fused"].items():
        close(gradients["recomputed"][key], gradient, 1e-3)  # attention's backward pass may add up in any order
        close(gradients["offloaded"][key], gradient, 1e-3)
    assert losses["fused"] == pytest.approx(losses["eager"], rel=1e-2)
    found, expected = (torch.cat([g.flatten() for g in gradients[name].values()]) for name in ("fused", "eager"))
    # Two roundings of the same gradient through a few layers of bfloat16.
    close(found, expected, 0.1)
