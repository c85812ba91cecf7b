"""The elementwise part of a feed-forward block, gated or plain, in one pass over memory each way.

    gated:  h = φ(g) · u        du = dh · φ(g)      dg = dh · u · φ′(g)          (Shazeer 2020, "GLU Variants Improve Transformer")
    plain:  h = φ(u)            du = dh · φ′(u)

All of these activations weigh x by a share p of it, so that φ(x) = x · p(x) and φ′(x) = p(x) + x · p′(x):

    silu        p = σ(x)                       quick_gelu  p = σ(1.702 x)
    gelu        p = (1 + erf(x / √2)) / 2      gelu_tanh   p = σ(√(8/π) · (x + 0.044715 x³))

Legend: g and u [M, I], the outputs of the gate and up projections, which stand beside each other in one tensor
[M, 2 I] where there is a gate; σ the logistic function. In float32 inside. Not differentiable itself:
`vlm.kernels.mlp` calls both ways.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlm.kernels.triton_use import use_triton

NAMES = ("silu", "quick_gelu", "gelu", "gelu_tanh")
_QUICK, _TANH, _CUBE = 1.702, math.sqrt(8 / math.pi), 0.044715


@functools.cache
def _types() -> Mapping[type, str]:
    from transformers.activations import ACT2FN

    # Asked of the table that models are built from: the names of its classes differ between versions.
    stock = {
        "silu": "silu",
        "gelu": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "quick_gelu": "quick_gelu",
    }
    return {type(ACT2FN[key]): name for key, name in stock.items()} | {torch.nn.SiLU: "silu"}


def name_of(activation: Callable[[Tensor], Tensor]) -> str | None:
    """Which of `NAMES` an activation is; None for any other.

    Args:
        activation: A module or function.
    """
    if isinstance(activation, torch.nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if activation is torch.nn.functional.silu:
        return "silu"
    return _types().get(type(activation))


def activate(
    inner: Tensor, activation: Callable[[Tensor], Tensor], *, gated: bool, out: Tensor, name: str | None
) -> None:
    """Computes h.

    Args:
        inner: Contiguous tensor of shape [M, 2 I], g left of u; in a plain block u alone, [M, I].
        activation: The function φ, called where it has no name.
        gated: Whether there is a gate.
        out: Where to write h: tensor of shape [M, I], whose rows may lie apart.
        name: What `name_of` says of the activation.
    """
    if name is not None and use_triton(inner):
        from vlm.kernels import activation_triton

        activation_triton.forward(inner, name, gated=gated, out=out)
        return
    if gated:
        g, u = inner.chunk(2, 1)
        torch.mul(activation(g), u, out=out)
    else:
        out.copy_(activation(inner))


def activate_backward(
    inner: Tensor, activation: Callable[[Tensor], Tensor], *, gated: bool, gradient: Tensor, name: str | None
) -> None:
    """Turns dh into the gradient of `inner`, in place.

    Args:
        inner: As in `activate`.
        activation: As in `activate`.
        gated: As in `activate`.
        gradient: Tensor of inner's shape, whose rows may lie apart. Holds dh where du comes: in the right half of a
            gated block, all over in a plain one.
        name: As in `activate`.
    """
    if name is not None and use_triton(inner):
        from vlm.kernels import activation_triton

        activation_triton.backward(inner, name, gated=gated, gradient=gradient)
        return
    parts = inner.chunk(2, 1) if gated else (inner,)
    dh = gradient.chunk(2, 1)[1] if gated else gradient
    if name is None:
        with torch.enable_grad():
            # Whatever the activation is, it differentiates itself.
            leaves = [part.detach().requires_grad_() for part in parts]
            h = activation(leaves[0]) * leaves[1] if gated else activation(leaves[0])
            found = torch.autograd.grad(h, leaves, dh)
        gradient.copy_(torch.cat(found, 1) if gated else found[0])
        return
    share, slope = _share(parts[0].float(), name)
    rate = slope.mul_(parts[0]).add_(share)
    if not gated:
        gradient.mul_(rate)
        return
    g, u = parts
    dg, du = gradient.chunk(2, 1)
    dg.copy_(rate.mul_(u).mul_(dh))
    du.mul_(share.mul_(g))


def _share(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The values p(x) and p′(x)."""
    if name == "gelu":
        return torch.erf(x * math.sqrt(0.5)).add_(1).mul_(0.5), torch.exp(-0.5 * x * x).div_(math.sqrt(2 * math.pi))
    rate: Any = 1.0
    if name == "gelu_tanh":
        share = torch.sigmoid(_TANH * (x + _CUBE * x**3))
        rate = _TANH * (1 + 3 * _CUBE * x * x)
    else:
        rate = _QUICK if name == "quick_gelu" else 1.0
        share = torch.sigmoid(rate * x)
    return share, (share - share * share) * rate
