"""RMSNorm with a frozen weight (Zhang and Sennrich 2019), keeping its input and one number per row.

    y = w · (x · ρ)     ρ = (mean(x²) + ε)^(−1/2)     dx = ρ · (w·dy − x̂ · mean(x̂ · w·dy))     x̂ = x · ρ

Legend: x, y [M, H]; w [H] frozen; ρ [M] in float32. As in the stock modules, the mean is taken in float32 and x̂ is
rounded to x's type before it is multiplied by w. The stock modules keep x in float32 and further copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.kernels.triton_use import use_triton


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if use_triton(x):
            from vlm.kernels import rms_norm_triton

            y, rho = rms_norm_triton.forward(x, weight, eps)
        else:
            wide = x.float()
            rho = torch.rsqrt(wide.pow(2).mean(-1) + eps)
            y = weight * (wide * rho[:, None]).to(x.dtype)
        ctx.weight = weight
        ctx.save_for_backward(x, rho)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, rho = ctx.saved_tensors
        if use_triton(x):
            from vlm.kernels import rms_norm_triton

            return rms_norm_triton.backward(x, ctx.weight, rho, dy), None, None
        normal = x.float() * rho[:, None]
        scaled = dy.float() * ctx.weight.float()
        dx = rho[:, None] * (scaled - normal * (normal * scaled).mean(-1, keepdim=True))
        return dx.to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises the last dimension.

    Args:
        x: Tensor of shape [..., H].
        weight: Tensor of shape [H], which does not learn here.
        eps: Added to the mean of squares.

    Returns:
        Tensor of x's shape, of the type that ``weight * x`` has.
    """
    y: Tensor = _RmsNorm.apply(x.reshape(-1, x.shape[-1]), weight.detach(), eps)
    return y.view(x.shape)


def rms_norm_eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same from plain differentiable operations, as oracle.

    Args:
        x: As above.
        weight: As above.
        eps: As above.
    """
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
