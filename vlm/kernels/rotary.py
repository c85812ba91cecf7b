"""Rotary position embedding of queries and keys (Su et al. 2021, "RoFormer") from given cosines and sines.

    y = x · cos + rot(x) · sin     rot((x₁, x₂)) = (−x₂, x₁)     dx = dy · cos + rotᵀ(dy · sin)     rotᵀ((x₁, x₂)) = (x₂, −x₁)

Legend: x [batch, heads, sequence, width]; x₁ and x₂ the halves of its last dimension, or where the layout is interleaved
(GPT-J, GLM) its even and its odd values; cos and sin [batch or 1, sequence, width]. Positions in several axes (mRoPE, rows and columns of patches) are in the angles already.
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
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        rotated_q, rotated_k = (_rotated(x, cos, sin, interleaved=interleaved, backward=False) for x in (q, k))
        return rotated_q, rotated_k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq_dk = (
            _rotated(dy, cos, sin, interleaved=ctx.interleaved, backward=True) if needed else None
            for dy, needed in zip((dq, dk), ctx.needs_input_grad, strict=False)
        )
        return *dq_dk, None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, backward: bool) -> Tensor:
    if use_triton(x):
        from vlm.kernels import rotary_triton

        return rotary_triton.rotate(x, cos, sin, interleaved=interleaved, backward=backward)
    wide, cos, sin = x.float(), cos.float()[:, None], sin.float()[:, None]
    # The transpose of a quarter turn is the turn the other way.
    turned = -_turned(wide * sin, interleaved) if backward else _turned(wide, interleaved) * sin
    return torch.addcmul(turned, wide, cos).to(x.dtype)


def _turned(x: Tensor, interleaved: bool) -> Tensor:
    """Computes rot(x)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys.

    Args:
        q: Tensor of shape [batch, heads, sequence, width], strides as they come.
        k: Tensor of shape [batch, key heads, sequence, width].
        cos: Tensor of shape [batch or 1, sequence, width], without gradient.
        sin: As `cos`.
        interleaved: Whether neighbours are rotated together, rather than values half a width apart.

    Returns:
        The rotated tensors, of the shapes and types of q and k.
    """
    rotated: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin, interleaved)
    return rotated


def rotary_eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """The same from plain differentiable operations, as oracle.

    Args:
        q: As above.
        k: As above.
        cos: As above.
        sin: As above.
        interleaved: As above.
    """

    def rotated(x: Tensor) -> Tensor:
        # Values that are rotated together stand along a dimension of size 2.
        dimension, shape = (-1, (-1, 2)) if interleaved else (-2, (2, -1))
        first, second = x.float().unflatten(-1, shape).unbind(dimension)
        turned = torch.stack((-second, first), dimension).flatten(-2)
        return (x.float() * cos.float()[:, None] + turned * sin.float()[:, None]).to(x.dtype)

    return rotated(q), rotated(k)
