"""The Triton kernels of `vlm.kernels.activation`: a program per piece of a row. Imported only where Triton is used."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _share(x, NAME: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values p(x) and p′(x)."""
    if NAME == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = share * (1.0 - share) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif NAME == "quick_gelu":
        share = tl.sigmoid(1.702 * x)
        slope = share * (1.0 - share) * 1.702
    else:
        share = tl.sigmoid(x)
        slope = share * (1.0 - share)
    return share, slope


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    inner_ptr, out_ptr, inner_row, out_row, width, NAME: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    at = inner_ptr + row * inner_row + columns
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    share, _ = _share(x, NAME)
    h = x * share
    if GATED:
        h = h * tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row + columns, h.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    inner_ptr,
    gradient_ptr,
    inner_row,
    gradient_row,
    width,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    at = inner_ptr + row * inner_row + columns
    gradient_at = gradient_ptr + row * gradient_row + columns
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    share, slope = _share(x, NAME)
    rate = share + x * slope
    # Every value of dh is read before the one of du at its place is written.
    if GATED:
        u = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(gradient_at + width, mask=mask, other=0.0).to(tl.float32)
        tl.store(gradient_at, (dh * u * rate).to(gradient_ptr.dtype.element_ty), mask=mask)
        tl.store(gradient_at + width, (dh * x * share).to(gradient_ptr.dtype.element_ty), mask=mask)
    else:
        dh = tl.load(gradient_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(gradient_at, (dh * rate).to(gradient_ptr.dtype.element_ty), mask=mask)


def forward(inner: Tensor, name: str, *, gated: bool, out: Tensor) -> None:
    """Writes h; see `vlm.kernels.activation.activate`."""
    num_rows, width = out.shape
    if out.numel():
        _forward_kernel[(num_rows, triton.cdiv(width, _BLOCK))](
            inner, out, inner.stride(0), out.stride(0), width, NAME=name, GATED=gated, BLOCK=_BLOCK
        )


def backward(inner: Tensor, name: str, *, gated: bool, gradient: Tensor) -> None:
    """Turns dh into the gradient of `inner`; see `vlm.kernels.activation.activate_backward`."""
    num_rows, width = inner.shape
    width //= 2 if gated else 1
    if inner.numel():
        _backward_kernel[(num_rows, triton.cdiv(width, _BLOCK))](
            inner, gradient, inner.stride(0), gradient.stride(0), width, NAME=name, GATED=gated, BLOCK=_BLOCK
        )
