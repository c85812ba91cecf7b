"""The Triton kernels of `vlm.kernels.swiglu`. Imported only where Triton is used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _forward_kernel(g_ptr, u_ptr, h_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    h = g * tl.sigmoid(g) * u
    tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(g_ptr, u_ptr, dh_ptr, dg_ptr, du_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    g = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(g)
    dg = dh * u * sigma * (1.0 + g * (1.0 - sigma))
    du = dh * g * sigma
    tl.store(dg_ptr + offsets, dg.to(dg_ptr.dtype.element_ty), mask=mask)
    tl.store(du_ptr + offsets, du.to(du_ptr.dtype.element_ty), mask=mask)


def forward(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) · u; see `vlm.kernels.swiglu.swiglu`."""
    h = torch.empty_like(g)
    _forward_kernel[(triton.cdiv(g.numel(), _BLOCK),)](g, u, h, g.numel(), BLOCK=_BLOCK)
    return h


def backward(g: Tensor, u: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """Dg and du; see `vlm.kernels.swiglu.swiglu_backward`."""
    # Every value of dh is read before the one of du at its place is written.
    dg, du = torch.empty_like(g), dh
    _backward_kernel[(triton.cdiv(g.numel(), _BLOCK),)](g, u, dh, dg, du, g.numel(), BLOCK=_BLOCK)
    return dg, du
