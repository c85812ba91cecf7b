"""LoRA layers and feed-forward blocks against the same from plain operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlm.kernels.frozen_linear import Projection
from vlm.kernels.lora_linear import lora_linear, lora_linear_eager
from vlm.kernels.mlp import Adapted, mlp, mlp_eager

Random = Callable[..., torch.Tensor]
STORAGES = ["dense", "nf4", "nf4_double"]


def frozen(inputs: int, outputs: int, storage: str, *, bias: bool) -> Any:
    torch.manual_seed(1)
    layer = torch.nn.Linear(inputs, outputs, bias=bias)
    if storage != "dense":
        import bitsandbytes as bnb

        quantised = bnb.nn.Linear4bit(
            inputs,
            outputs,
            bias=bias,
            compute_dtype=torch.float32,
            compress_statistics=storage == "nf4_double",
            quant_type="nf4",
        )
        quantised.load_state_dict(layer.state_dict())
        layer = quantised.to("cpu")  # quantises
        assert layer.weight.dtype == torch.uint8
    return layer.requires_grad_(False)


def adapted(
    inputs: int, outputs: int, random: Random, storage: str = "dense", *, bias: bool = True, rank: int = 3
) -> Adapted:
    projection = Projection(frozen(inputs, outputs, storage, bias=bias), scaling=0.7)
    if not rank:
        return projection, None, None
    return projection, random(rank, inputs, scale=0.3, learns=True), random(outputs, rank, scale=0.3, learns=True)


def compare(fused: Callable[[], torch.Tensor], eager: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> None:
    outputs, gradients = [], []
    for function in (fused, eager):
        y = function()
        outputs.append(y.detach())
        gradients.append(torch.autograd.grad(y.square().sum(), inputs))
    # The same products in float32, added up in another order: a few units of 2^-23 of the largest terms.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2e-6, atol=2e-6 * float(outputs[1].abs().max()))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("shape", "outputs", "bias", "rank"),
    # A rank of 16 is a part of the product forward where outputs are more, backward where inputs are more.
    [((5, 64), 96, True, 3), ((2, 7, 64), 96, False, 16), ((5, 64), 32, True, 16), ((1, 64), 96, True, 0)],
)
def test_lora_linear(random: Random, storage: str, shape: tuple[int, ...], outputs: int, bias: bool, rank: int) -> None:
    layer = adapted(64, outputs, random, storage, bias=bias, rank=rank)
    x = random(*shape, learns=True)
    inputs = [tensor for tensor in (x, *layer[1:]) if tensor is not None]
    compare(lambda: lora_linear(x, *layer), lambda: lora_linear_eager(x, *layer), inputs)


def test_the_dense_form_of_a_4_bit_weight_is_the_layers_own(random: Random) -> None:
    for storage in STORAGES[1:]:
        layer = frozen(64, 96, storage, bias=False)
        x = random(5, 64)
        torch.testing.assert_close(x @ Projection(layer).weight(torch.float32).t(), layer(x), rtol=1e-5, atol=1e-5)


def test_an_input_without_gradient_gets_none(random: Random) -> None:
    layer = adapted(64, 96, random)
    x = random(5, 64)
    y = lora_linear(x, *layer)
    y.sum().backward()
    assert x.grad is None
    assert layer[1] is not None
    assert layer[1].grad is not None


def test_nothing_is_kept_without_gradients(random: Random, stored: Callable[[], list[torch.Tensor]]) -> None:
    layer = adapted(64, 96, random)
    with torch.no_grad():
        y = lora_linear(random(5, 64), *layer)
    assert not y.requires_grad
    assert stored() == []


def test_autocast_decides_the_type(random: Random) -> None:
    layer = adapted(64, 96, random)
    x = random(5, 64, learns=True)
    with torch.autocast("cpu", torch.float16):
        y = lora_linear(x, *layer)
    assert y.dtype == torch.float16
    y.float().sum().backward()
    assert layer[1] is not None
    assert layer[1].grad is not None
    # The matrices and the input keep their own type.
    assert (layer[1].grad.dtype, x.grad.dtype) == (torch.float32, torch.float32)
    expected = lora_linear_eager(x, *layer)
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2 * float(expected.detach().abs().max()))

    # A feed-forward block likewise, which writes products into tensors of its own.
    up, down, gate = adapted(64, 100, random), adapted(100, 64, random), adapted(64, 100, random)
    act = activation("silu")
    with torch.autocast("cpu", torch.float16):
        y = mlp(x, up, down, gate, act)
    assert y.dtype == torch.float16
    matrices = [matrix for part in (up, down, gate) for matrix in part[1:]]
    expected = mlp_eager(x, up, down, gate, act)
    results = [(y.float(), expected)]
    results += zip(*(torch.autograd.grad(out.float().sum(), matrices) for out in (y, expected)), strict=True)
    for found, wanted in results:
        assert found.dtype == torch.float32
        # As vectors: rounded to 11 bits in each of a handful of steps.
        assert (found - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize("storage", STORAGES)
def test_what_a_lora_layer_keeps(random: Random, storage: str, stored: Callable[[], list[torch.Tensor]]) -> None:
    """Three projections of one input keep it once, and a few columns each; never a dense weight."""
    x = random(5, 64, learns=True)
    layers = [adapted(64, 96, random, storage) for _ in range(3)]
    for layer in layers:
        lora_linear(x, *layer)
    inputs, others = (
        [tensor for tensor in stored() if (tensor.shape == (5, 64)) is wanted] for wanted in (True, False)
    )
    assert len({tensor.data_ptr() for tensor in inputs}) == 1
    # A, B and the product of x and A.
    assert {tuple(tensor.shape) for tensor in others} == {(3, 64), (96, 3), (5, 3)}


ACTIVATIONS = {"silu": torch.nn.SiLU(), "gelu": torch.nn.GELU(), "quick_gelu": None}


def activation(name: str) -> Any:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("ranks", [(3, 5, 2), (0, 4, 0), (4, 0, 0)])
def test_mlp(random: Random, name: str, gated: bool, ranks: tuple[int, int, int]) -> None:
    up = adapted(64, 96, random, "nf4", rank=ranks[0])
    down = adapted(96, 64, random, "dense", bias=False, rank=ranks[1])
    gate = adapted(64, 96, random, "nf4_double", bias=False, rank=ranks[2]) if gated else None
    x = random(2, 5, 64, learns=True)
    act = activation(name)
    matrices = [matrix for layer in (up, down, gate) if layer for matrix in layer[1:] if matrix is not None]
    compare(lambda: mlp(x, up, down, gate, act), lambda: mlp_eager(x, up, down, gate, act), [x, *matrices])
    # Without a gradient of the input, as in the first block over a frozen tower.
    y = x.detach()
    compare(lambda: mlp(y, up, down, gate, act), lambda: mlp_eager(y, up, down, gate, act), matrices)


@pytest.mark.parametrize("name", ["silu", "unnamed"])
@pytest.mark.parametrize("gated", [True, False])
def test_a_width_that_is_padded(random: Random, name: str, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 columns run as 128; an activation that is not 0 at 0 does not show outside."""
    act = torch.nn.SiLU() if name == "silu" else torch.cos
    up, down = adapted(64, 100, random, "nf4_double"), adapted(100, 64, random, "nf4_double")
    gate = adapted(64, 100, random, "nf4") if gated else None
    widths = []
    empty = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        widths.append(size[-1])
        found = empty(self, *size, **options)
        # Memory as it may be found.
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    x = random(5, 64, learns=True)
    matrices = [matrix for layer in (up, down, gate) if layer for matrix in layer[1:]]
    compare(lambda: mlp(x, up, down, gate, act), lambda: mlp_eager(x, up, down, gate, act), [x, *matrices])
    # Of the stack of `down`, and of h, with the columns of the update.
    assert 128 + 8 in widths


@pytest.mark.parametrize("gated", [True, False])
def test_what_a_block_keeps(random: Random, gated: bool, stored: Callable[[], list[torch.Tensor]]) -> None:
    up, down = adapted(64, 96, random, "nf4"), adapted(96, 64, random, "nf4")
    gate = adapted(64, 96, random, "nf4") if gated else None
    mlp(random(5, 64, learns=True), up, down, gate, torch.nn.SiLU())
    matrices = [matrix for layer in (up, down, gate) if layer for matrix in layer[1:]]
    kept = [tensor for tensor in stored() if not any(tensor is matrix for matrix in matrices)]
    widths = sorted(tensor.shape[-1] for tensor in kept)
    # The input with three columns of each update, padded to eight; then what the activation is applied to.
    assert widths == [64 + 8, 2 * 96 if gated else 96]


@pytest.mark.parametrize("gated", [True, False])
def test_recomputing_a_block_leaves_out_its_last_product(
    random: Random, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.checkpoint import checkpoint

    up, down = adapted(64, 96, random), adapted(96, 64, random)
    gate = adapted(64, 96, random) if gated else None
    calls: list[Any] = []
    stock = Projection.write_weight

    def write_weight(self: Projection, out: torch.Tensor) -> None:
        calls.append(self)
        stock(self, out)

    monkeypatch.setattr(Projection, "write_weight", write_weight)
    x = random(5, 64, learns=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x + mlp(x, up, down, gate, torch.nn.SiLU())

    inputs = [x, *up[1:], *down[1:]]
    gradients = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), inputs)
    # Once more than that in the backward pass itself.
    assert [calls.count(part[0]) for part in (up, down)] == [3, 2]
    for found, expected in zip(gradients, torch.autograd.grad(layer(x).square().sum(), inputs), strict=True):
        assert torch.equal(found, expected)
