"""RMSNorm, SwiGLU, rotary embedding and unpacking against the same from plain operations, with and without Triton.

The kernels themselves run on a GPU, or anywhere under Triton's interpreter: TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlm.kernels.frozen_linear import dequantized
from vlm.kernels.rms_norm import rms_norm, rms_norm_eager
from vlm.kernels.rotary import rotary, rotary_eager
from vlm.kernels.swiglu import swiglu, swiglu_backward
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 1030)])
def test_swiglu(random: Random, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g, u = (random(*shape, scale=2.0).to(device, dtype).requires_grad_() for _ in range(2))
    dh = random(*shape).to(device, dtype)
    expected = torch.nn.functional.silu(g) * u
    assert_near(swiglu(g.detach(), u.detach()), expected, dtype)
    for found, gradient in zip(
        swiglu_backward(g.detach(), u.detach(), dh.clone()), torch.autograd.grad(expected, (g, u), dh), strict=True
    ):
        assert_near(found, gradient, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("batch", "angles"), [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("width", [4, 80])
def test_rotary(random: Random, device: str, dtype: torch.dtype, batch: int, angles: int, width: int) -> None:
    # 12 query heads over 3 key heads, as views of a projection's rows.
    rows = random(batch, 5, 15, width).to(device, dtype).requires_grad_()
    q, k = (part.transpose(1, 2) for part in rows.split((12, 3), dim=2))
    cos, sin = (random(angles, 5, width).to(device, dtype) for _ in range(2))
    found, expected = (torch.cat(function(q, k, cos, sin), 1) for function in (rotary, rotary_eager))
    assert_near(found, expected, dtype)
    dy = random(batch, 15, 5, width).to(device, dtype)
    assert_near(*(torch.autograd.grad(y, rows, dy)[0] for y in (found, expected)), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 64), (96, 192), (520, 128)])
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


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
def test_triton_runs_where_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.kernels.triton_use import use_triton

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not use_triton(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton(torch.zeros(1))
