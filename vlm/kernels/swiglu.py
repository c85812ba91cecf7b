"""SwiGLU's elementwise part: h = silu(g) · u (Shazeer 2020, "GLU Variants Improve Transformer").

    silu(g) = g · σ(g)     du = dh · silu(g)     dg = dh · u · σ(g) · (1 + g · (1 − σ(g)))

Legend: g and u [M, I], the outputs of the gate and up projections; σ the logistic function. One pass over memory each
way, in float32 inside. Not differentiable itself: `vlm.kernels.mlp` calls both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.kernels.triton_use import use_triton


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    """Computes h.

    Args:
        g: Contiguous tensor of shape [M, I].
        u: Contiguous tensor of shape [M, I].
    """
    if use_triton(g):
        from vlm.kernels import swiglu_triton

        return swiglu_triton.forward(g, u)
    return torch.nn.functional.silu(g).mul_(u)


def swiglu_backward(g: Tensor, u: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """Computes dg and du.

    Args:
        g: As in `swiglu`.
        u: As in `swiglu`.
        dh: Contiguous tensor of shape [M, I], whose memory may be used for the result.
    """
    if use_triton(g):
        from vlm.kernels import swiglu_triton

        return swiglu_triton.backward(g, u, dh)
    sigma = torch.sigmoid(g)
    slope = (1 - sigma).mul_(g).add_(1).mul_(sigma)
    return slope.mul_(u).mul_(dh), sigma.mul_(g).mul_(dh)
