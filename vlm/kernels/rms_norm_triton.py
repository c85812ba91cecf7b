"""The Triton kernels of `vlm.kernels.rms_norm`: one program per row. Imported only where Triton is used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward_kernel(x_ptr, w_ptr, y_ptr, rho_ptr, stride, width, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    rho = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    normal = (x * rho).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * width + columns, (normal * w).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rho_ptr + row, rho)


@triton.jit
def _backward_kernel(x_ptr, w_ptr, rho_ptr, dy_ptr, dx_ptr, stride, dy_stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
    rho = tl.load(rho_ptr + row)
    normal = x * rho
    scaled = dy * w
    dx = rho * (scaled - normal * (tl.sum(normal * scaled, axis=0) / width))
    tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _launch(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Y of shape [M, H] and ρ of shape [M]; see `vlm.kernels.rms_norm`."""
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    rho = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        _forward_kernel[(len(x),)](x, weight, y, rho, x.stride(0), x.shape[1], eps, **_launch(x.shape[1]))
    return y, rho


def backward(x: Tensor, weight: Tensor, rho: Tensor, dy: Tensor) -> Tensor:
    """Dx of shape [M, H]; see `vlm.kernels.rms_norm`."""
    if x.stride(1) != 1:
        x = x.contiguous()
    if dy.stride(1) != 1:
        dy = dy.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        _backward_kernel[(len(x),)](
            x, weight, rho, dy, dx, x.stride(0), dy.stride(0), x.shape[1], **_launch(x.shape[1])
        )
    return dx
