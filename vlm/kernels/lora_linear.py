"""LoRA over a frozen linear layer as one autograd function (formula: `vlm.kernels.frozen_linear`).

peft's own layer keeps, for each adapted projection, copies of x and of the update in other types, and the sum of both
branches. This one keeps x, which neighbours such as the query, key and value projections share, and matrices of
r rows or columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.kernels.frozen_linear import Projection, Update, compute_dtype


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, projection: Projection) -> Tensor:
        y, update = projection.forward(x, a, b)
        ctx.projection, ctx.dtype = projection, None if a is None else a.dtype
        # Without A's gradient, x is of no use to the backward pass.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, *(update or ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        update = Update(*kept) if kept else None
        gradients = ctx.projection.backward(dy, x, update, needs=ctx.needs_input_grad[:3], dtype=ctx.dtype)
        return *gradients, None


def lora_linear(x: Tensor, projection: Projection, a: Tensor | None, b: Tensor | None) -> Tensor:
    """Applies a frozen linear layer with its update.

    Args:
        x: Tensor of shape [..., K].
        projection: The layer.
        a: Matrix A of shape [r, K], in float32 as it is trained; None for no update.
        b: Matrix B of shape [N, r].

    Returns:
        Tensor of shape [..., N] in autocast's type, or in x's own outside of autocast.
    """
    rows = x.to(compute_dtype(x)).reshape(-1, x.shape[-1])
    y: Tensor = _LoraLinear.apply(rows, a, b, projection)
    return y.view(*x.shape[:-1], y.shape[-1])


def lora_linear_eager(x: Tensor, projection: Projection, a: Tensor | None, b: Tensor | None) -> Tensor:
    """The same from plain differentiable operations, as oracle.

    Args:
        x: As above.
        projection: As above.
        a: As above.
        b: As above.
    """
    dtype = compute_dtype(x)
    x = x.to(dtype)
    y = torch.nn.functional.linear(x, projection.weight(dtype), projection.layer.bias)
    if a is None or b is None:
        return y
    return y + projection.scaling * ((x @ a.to(dtype).t()) @ b.to(dtype).t())
