"""The Triton kernels of `vlm.kernels.layer_norm`: one program per row. Imported only where Triton is used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, b_ptr, y_ptr, stride, width, eps, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - tl.sum(x, axis=0) / width, 0.0)
    y = w * (centred * (1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)))
    if HAS_BIAS:
        y += tl.load(b_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, dy_ptr, dx_ptr, stride, dy_stride, width, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    scaled = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32) * w
    centred = tl.where(mask, x - tl.sum(x, axis=0) / width, 0.0)
    rho = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    normal = centred * rho
    dx = rho * (scaled - tl.sum(scaled, axis=0) / width - normal * (tl.sum(normal * scaled, axis=0) / width))
    tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _launch(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Y of shape [M, H]; see `vlm.kernels.layer_norm`."""
    x = _rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        _forward_kernel[(len(x),)](
            x,
            weight,
            weight if bias is None else bias,
            y,
            x.stride(0),
            x.shape[1],
            eps,
            HAS_BIAS=bias is not None,
            **_launch(x.shape[1]),
        )
    return y


def backward(x: Tensor, weight: Tensor, dy: Tensor, eps: float) -> Tensor:
    """Dx of shape [M, H]; see `vlm.kernels.layer_norm`."""
    x, dy = _rows(x), _rows(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        _backward_kernel[(len(x),)](
            x, weight, dy, dx, x.stride(0), dy.stride(0), x.shape[1], eps, **_launch(x.shape[1])
        )
    return dx
