"""The Triton kernel of `vlm.kernels.host_embedding`: one program per part of a row. Imported only where Triton is used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_COLUMNS = 2048


@triton.jit
def _kernel(ids_ptr, weight_ptr, y_ptr, num_words, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # In 64 bits: a table of 150,000 words has more than 2^29 values, and larger ones pass 2^31.
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + place).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # No number for a word that is not there, rather than somebody else's memory.
    readable = tl.where((row >= 0) & (row < num_words), width, 0)
    values = tl.load(weight_ptr + row * width + columns, mask=columns < readable, other=float("nan"))
    tl.store(y_ptr + place * width + columns, values, mask=columns < width)


def gather(ids: Tensor, weight: Tensor) -> Tensor:
    """Y of shape [M, H] on the ids' device; see `vlm.kernels.host_embedding`.

    Args:
        ids: Tensor of shape [M], contiguous.
        weight: Tensor of shape [V, H], contiguous, in memory that the device can read.
    """
    num_words, width = weight.shape
    y = torch.empty(len(ids), width, dtype=weight.dtype, device=ids.device)
    if len(ids):
        block = min(triton.next_power_of_2(width), _MOST_COLUMNS)
        _kernel[(len(ids), triton.cdiv(width, block))](ids, weight, y, num_words, width, BLOCK=block)
    return y
