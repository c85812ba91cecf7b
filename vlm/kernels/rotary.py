"""Rotary position embedding of queries and keys (Su et al. 2021, "RoFormer") from given cosines and sines.

    y = x · cos + rot(x) · sin     rot((x₁, x₂)) = (−x₂, x₁)     dx = dy · cos + rotᵀ(dy · sin)     rotᵀ((x₁, x₂)) = (x₂, −x₁)

Legend: x [batch, heads, sequence, width] or without batch, x₁ and x₂ the halves of its last dimension; cos and sin
[batch or 1, sequence, width]. Positions in several axes (mRoPE, rows and columns of patches) are in the angles already.
Kept for the backward pass: cos and sin. Computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.kernels.triton_use import use_triton


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(q, cos, sin, backward=False), _rotated(k, cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq_dk = (
            _rotated(dy, cos, sin, backward=True) if needed else None
            for dy, needed in zip((dq, dk), ctx.needs_input_grad, strict=False)
        )
        return *dq_dk, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    if use_triton(x):
        from vlm.kernels import rotary_triton

        return rotary_triton.rotate(x, cos, sin, backward=backward)
    wide, cos, sin = x.float(), cos.float()[:, None], sin.float()[:, None]
    if backward:
        first, second = (wide * sin).chunk(2, -1)
        return torch.addcmul(torch.cat((second, -first), -1), wide, cos).to(x.dtype)
    first, second = wide.chunk(2, -1)
    return torch.addcmul(torch.cat((-second, first), -1) * sin, wide, cos).to(x.dtype)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys.

    Args:
        q: Tensor of shape [batch, heads, sequence, width], strides as they come.
        k: Tensor of shape [batch, key heads, sequence, width].
        cos: Tensor of shape [batch or 1, sequence, width], without gradient.
        sin: As `cos`.

    Returns:
        The rotated tensors, of the shapes and types of q and k.
    """
    rotated: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin)
    return rotated


def rotary_eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The same from plain differentiable operations, as oracle.

    Args:
        q: As above.
        k: As above.
        cos: As above.
        sin: As above.
    """

    def rotated(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        return (x.float() * cos.float()[:, None] + turned * sin.float()[:, None]).to(x.dtype)

    return rotated(q), rotated(k)
