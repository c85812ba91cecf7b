"""Dequantisation of a doubly quantised NF4 weight in one kernel. Imported only where Triton is used.

    w = table[n] · (code[c] · m + o)          Dettmers et al. 2023, "QLoRA"

Legend: n a weight's four bits, two to a byte, the first in the upper half; c the 8-bit scale of its block of 64 weights
and m the scale of 256 such scales; table, code and o as stored. bitsandbytes takes three kernels and a float32 copy of
all scales, which at small sizes is mostly the host's time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
# Places are counted in 32 bits, up to the end of the last block.
_MOST_WEIGHTS = 2**31 - 2 * _BLOCK


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    packed_ptr,
    scales_ptr,
    code_ptr,
    outer_ptr,
    offset_ptr,
    table_ptr,
    out_ptr,
    num_bytes,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    BYTES_PER_SCALE: tl.constexpr,
    SCALES_PER_OUTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK
    places = first + tl.arange(0, BLOCK)
    mask = places < num_bytes
    packed = tl.load(packed_ptr + places, mask=mask, other=0).to(tl.int32)
    block = places // BYTES_PER_SCALE
    inner = tl.load(code_ptr + tl.load(scales_ptr + block, mask=mask, other=0).to(tl.int32), mask=mask, other=0.0)
    outer = tl.load(outer_ptr + block // SCALES_PER_OUTER, mask=mask, other=0.0)
    # In two roundings, as they are stored to be read.
    scale = inner * outer + tl.load(offset_ptr)
    upper = tl.load(table_ptr + (packed >> 4)) * scale
    lower = tl.load(table_ptr + (packed & 15)) * scale
    both = tl.interleave(upper, lower)
    out_places = 2 * first + tl.arange(0, 2 * BLOCK)
    mask = out_places < 2 * num_bytes
    if ROW != WIDTH:
        # Both are constants of the kernel, or the division would take longer than all else.
        out_places = (out_places // WIDTH).to(tl.int64) * ROW + out_places % WIDTH
    tl.store(out_ptr + out_places, both.to(out_ptr.dtype.element_ty), mask=mask)


def takes(packed: Tensor, state: Any) -> bool:
    """Whether the kernel reads this layout.

    Args:
        packed: The stored bytes.
        state: Its bitsandbytes `QuantState`.
    """
    return bool(
        state.nested
        and state.quant_type == "nf4"
        and packed.dtype == torch.uint8
        and 2 * packed.numel() == state.shape.numel() < _MOST_WEIGHTS
        and state.absmax.dtype == torch.uint8
    )


def dequantize_into(packed: Tensor, state: Any, out: Tensor) -> None:
    """Unpacks a weight.

    Args:
        packed: The stored bytes.
        state: Its `QuantState`, of which `takes` is true.
        out: Tensor of shape [N, K], whose rows may lie apart.
    """
    inner = state.state2
    # Where rows follow each other, all shapes share one kernel.
    row, width = (0, 0) if out.is_contiguous() else (out.stride(0), out.shape[1])
    _kernel[(triton.cdiv(packed.numel(), _BLOCK),)](
        packed,
        state.absmax,
        inner.code,
        inner.absmax,
        state.offset,
        state.code,
        out,
        packed.numel(),
        WIDTH=width,
        ROW=row,
        BYTES_PER_SCALE=state.blocksize // 2,
        SCALES_PER_OUTER=inner.blocksize,
        BLOCK=_BLOCK,
    )
