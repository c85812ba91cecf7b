"""Norms, activations, rotary embedding and unpacking against the same from plain operations, with and without Triton.

The kernels themselves run on a GPU, or anywhere under Triton's interpreter: TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlm.kernels.activation import NAMES, activate, activate_backward, name_of
from vlm.kernels.frozen_linear import dequantize_into, dequantized
from vlm.kernels.layer_norm import layer_norm, layer_norm_eager
from vlm.kernels.rms_norm import rms_norm, rms_norm_eager
from vlm.kernels.rotary import rotary, rotary_eager
from vlm.kernels.triton_use import has_triton

Random = Callable[..., torch.Tensor]
ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
DEVICES = ["cpu", ON_GPU]
# float32: the order of sums. bfloat16 has 8 bits, and the stock modules round once more than the kernels do.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == expected.dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 80), (2, 3, 130)])
def test_rms_norm(random: Random, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = random(*shape, scale=3.0).to(device, dtype).requires_grad_()
    weight = random(shape[-1]).to(device, dtype)
    dy = random(*shape).to(device, dtype)
    found, expected = rms_norm(x, weight, 1e-6), rms_norm_eager(x, weight, 1e-6)
    assert_near(found, expected, dtype)
    assert_near(*(torch.autograd.grad(y, x, dy)[0] for y in (found, expected)), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("shape", "has_bias"), [((1, 8), True), ((2, 3, 130), True), ((5, 80), False)])
def test_layer_norm(random: Random, device: str, dtype: torch.dtype, shape: tuple[int, ...], has_bias: bool) -> None:
    # Off zero by more than its width, as the variance must not be a difference of large numbers.
    x = random(*shape, scale=3.0).add(20.0).to(device, dtype).requires_grad_()
    weight, bias = random(shape[-1]).to(device, dtype), random(shape[-1]).to(device, dtype) if has_bias else None
    dy = random(*shape).to(device, dtype)
    found, expected = layer_norm(x, weight, bias, 1e-6), layer_norm_eager(x, weight, bias, 1e-6)
    assert_near(found, expected, dtype)
    assert_near(*(torch.autograd.grad(y, x, dy)[0] for y in (found, expected)), dtype)


def test_what_layer_norm_keeps(random: Random, stored: Callable[[], list[torch.Tensor]]) -> None:
    x = random(5, 80, learns=True)
    layer_norm(x, random(80), random(80), 1e-6)
    assert [tensor.data_ptr() for tensor in stored()] == [x.data_ptr()]


def test_rms_norm_is_the_stock_module(random: Random) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

    module = Qwen2_5_VLRMSNorm(80, eps=1e-5)
    module.weight.data = random(80)
    x = random(5, 80)
    assert_near(rms_norm(x, module.weight, 1e-5), module(x), torch.float32)


def test_what_rms_norm_keeps(random: Random, stored: Callable[[], list[torch.Tensor]]) -> None:
    x = random(5, 80, learns=True)
    rms_norm(x, random(80), 1e-6)
    assert [tuple(tensor.shape) for tensor in stored()] == [(5, 80), (5,)]
    assert stored()[0].data_ptr() == x.data_ptr()


STOCK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("name", "gated"), [(name, False) for name in NAMES] + [("silu", True), ("gelu_tanh", True)])
def test_activation(random: Random, device: str, dtype: torch.dtype, name: str, gated: bool) -> None:
    num_rows, width = 3, 1030
    inner = random(num_rows, width * (2 if gated else 1), scale=2.0).to(device, dtype).requires_grad_()
    dh = random(num_rows, width).to(device, dtype)
    stock = STOCK[name]
    if gated:
        g, u = inner.chunk(2, 1)
        expected = stock(g) * u
    else:
        expected = stock(inner)
    # Rows lie apart, as beside the columns of an update.
    found = torch.full((num_rows, width + 8), 7.0, device=device, dtype=dtype)
    activate(inner.detach(), stock, gated=gated, out=found[:, :width], name=name)
    assert_near(found[:, :width], expected, dtype)
    work = torch.full((num_rows, inner.shape[1] + 8), 7.0, device=device, dtype=dtype)
    gradient = work[:, : inner.shape[1]]
    gradient[:, -width:] = dh
    activate_backward(inner.detach(), stock, gated=gated, gradient=gradient, name=name)
    assert_near(gradient, torch.autograd.grad(expected, inner, dh)[0], dtype)
    assert (found[:, width:] == 7).all()
    assert (work[:, inner.shape[1] :] == 7).all()


def test_the_models_activations_are_known() -> None:
    from transformers.activations import ACT2FN

    expected = {
        "silu": "silu",
        "swish": "silu",
        "quick_gelu": "quick_gelu",
        "gelu": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": None,
    }
    x = torch.linspace(-6, 6, 101)
    for key, name in expected.items():
        assert name_of(ACT2FN[key]) == name, key
        if name is not None:
            torch.testing.assert_close(ACT2FN[key](x), STOCK[name](x))
    modules = [torch.nn.SiLU(), torch.nn.GELU(), torch.nn.GELU(approximate="tanh"), torch.nn.ReLU()]
    assert [name_of(module) for module in modules] == ["silu", "gelu", "gelu_tanh", None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("batch", "angles"), [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("width", [4, 80])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(
    random: Random, device: str, dtype: torch.dtype, batch: int, angles: int, width: int, interleaved: bool
) -> None:
    # 12 query heads over 3 key heads, as views of a projection's rows.
    rows = random(batch, 5, 15, width).to(device, dtype).requires_grad_()
    q, k = (part.transpose(1, 2) for part in rows.split((12, 3), dim=2))
    cos, sin = (random(angles, 5, width).to(device, dtype) for _ in range(2))
    found, expected = (
        torch.cat(function(q, k, cos, sin, interleaved=interleaved), 1) for function in (rotary, rotary_eager)
    )
    assert_near(found, expected, dtype)
    dy = random(batch, 15, 5, width).to(device, dtype)
    assert_near(*(torch.autograd.grad(y, rows, dy)[0] for y in (found, expected)), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 64), (96, 192), (128, 100), (520, 128)])
def test_nf4(random: Random, device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    import bitsandbytes as bnb

    weight = bnb.nn.Params4bit(random(*shape), requires_grad=False, compress_statistics=True, quant_type="nf4").to(
        device
    )
    state = weight.quant_state
    found = dequantized(weight.data, state, dtype)
    state.dtype = torch.float32
    expected = bnb.functional.dequantize_4bit(weight.data, state)
    assert found.shape == shape
    # A product and a sum may be rounded once or twice in between.
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-7)
    # Into rows that lie apart.
    room = torch.full((shape[0], shape[1] + 24), 7.0, dtype=dtype, device=device)
    dequantize_into(weight.data, state, room[:, : shape[1]])
    assert torch.equal(room[:, : shape[1]], found)
    assert (room[:, shape[1] :] == 7).all()


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
def test_triton_runs_where_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.kernels.triton_use import use_triton

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not use_triton(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton(torch.zeros(1))
