"""LayerNorm (Ba et al. 2016) over frozen weights, keeping its input alone.

    y = w · x̂ + b     x̂ = (x − μ) · ρ     ρ = (mean((x − μ)²) + ε)^(−1/2)
    dx = ρ · (w·dy − mean(w·dy) − x̂ · mean(x̂ · w·dy))

Legend: x, y [M, H]; w and b [H] frozen; μ the mean of a row. In float32 inside, and rounded once, to x's type: under
autocast the stock module gives float32, which the projection behind it then rounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.kernels.triton_use import use_triton


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        ctx.weight, ctx.eps = weight, eps
        ctx.save_for_backward(x)
        if use_triton(x):
            from vlm.kernels import layer_norm_triton

            return layer_norm_triton.forward(x, weight, bias, eps)
        normal, _ = _normal(x, eps)
        y = normal.mul_(weight)
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if use_triton(x):
            from vlm.kernels import layer_norm_triton

            return layer_norm_triton.backward(x, ctx.weight, dy, ctx.eps), None, None, None
        normal, rho = _normal(x, ctx.eps)
        scaled = dy.float() * ctx.weight.float()
        along = (normal * scaled).mean(-1, keepdim=True)
        dx = rho * (scaled - scaled.mean(-1, keepdim=True) - normal * along)
        return dx.to(x.dtype), None, None, None


def _normal(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x̂ of shape [M, H] and ρ of shape [M, 1], in float32."""
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    rho = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred.mul_(rho), rho


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Normalises the last dimension.

    Args:
        x: Tensor of shape [..., H].
        weight: Tensor of shape [H], which does not learn here.
        bias: As `weight`, or None.
        eps: Added to the variance.

    Returns:
        Tensor of x's shape and type.
    """
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _LayerNorm.apply(rows, weight.detach(), None if bias is None else bias.detach(), eps)
    return y.view(x.shape)


def layer_norm_eager(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The same from PyTorch's own operation, as oracle.

    Args:
        x: As above.
        weight: As above.
        bias: As above.
        eps: As above.
    """
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
