"""The Triton kernel of `vlm.kernels.rotary`: one program per position, all heads. Imported only where Triton is used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    x_batch,
    x_head,
    x_row,
    y_batch,
    y_head,
    y_row,
    cos_batch,
    cos_row,
    sin_batch,
    sin_row,
    num_heads,
    half,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < half
    # From the first value of a pair to the second.
    apart = half
    if INTERLEAVED:
        columns = columns * 2
        apart = 1
    cos_at = cos_ptr + batch * cos_batch + row * cos_row + columns
    sin_at = sin_ptr + batch * sin_batch + row * sin_row + columns
    cos1 = tl.load(cos_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_at + apart, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_at + apart, mask=inside, other=0.0).to(tl.float32)[None, :]
    for start in range(0, num_heads, HEADS):
        heads = (start + tl.arange(0, HEADS)).to(tl.int64)
        mask = (heads < num_heads)[:, None] & inside[None, :]
        x_at = x_ptr + batch * x_batch + row * x_row + heads[:, None] * x_head + columns[None, :]
        y_at = y_ptr + batch * y_batch + row * y_row + heads[:, None] * y_head + columns[None, :]
        x1 = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_at + apart, mask=mask, other=0.0).to(tl.float32)
        if BACKWARD:
            y1 = x1 * cos1 + x2 * sin2
            y2 = x2 * cos2 - x1 * sin1
        else:
            y1 = x1 * cos1 - x2 * sin1
            y2 = x2 * cos2 + x1 * sin2
        tl.store(y_at, y1.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_at + apart, y2.to(y_ptr.dtype.element_ty), mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, backward: bool) -> Tensor:
    """Rotates by the angles, or back; see `vlm.kernels.rotary`."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos, sin = (angle if angle.stride(-1) == 1 else angle.contiguous() for angle in (cos, sin))
    batch, num_heads, length, width = x.shape
    # Heads of one position beside each other, as attention wants them next.
    y = torch.empty((batch, length, num_heads, width), dtype=x.dtype, device=x.device).transpose(1, 2)
    if x.numel():
        block = triton.next_power_of_2(width // 2)
        _rotate_kernel[(length, batch)](
            x,
            y,
            cos,
            sin,
            *x.stride()[:3],
            *y.stride()[:3],
            cos.stride(0) if len(cos) > 1 else 0,
            cos.stride(1),
            sin.stride(0) if len(sin) > 1 else 0,
            sin.stride(1),
            num_heads,
            width // 2,
            INTERLEAVED=interleaved,
            BACKWARD=backward,
            HEADS=min(8, triton.next_power_of_2(num_heads)),
            BLOCK=block,
        )
    return y
