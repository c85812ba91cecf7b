"""Arithmetic of a frozen linear layer with a LoRA update, in parts, for the autograd functions beside this file.

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ                      Hu et al. 2021, "LoRA"
    dx = dy W + s · (dy B) A     dA = s · (dy B)ᵀ x     dB = s · dyᵀ (x Aᵀ)

Legend: x [M, K] inputs, y [M, N] outputs, W [N, K] frozen, b [N] frozen, A [r, K] and B [N, r] trained, s the scaling.

W is stored dense or in NF4. A dense copy of an NF4 weight lives from its dequantisation to the end of the matrix product
and no longer: the backward pass makes it again, which costs about 4 % of the product on a GPU at 12,000 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm.kernels.triton_use import use_triton


class Gradients(NamedTuple):
    """What the backward pass of a projection gives; None where nobody asked."""

    x: Tensor | None
    """Tensor of shape [M, K]."""
    a: Tensor | None
    """Tensor of shape [r, K] in A's own type."""
    b: Tensor | None
    """Tensor of shape [N, r] in B's own type."""


@dataclass(frozen=True, eq=False)
class Projection:
    """A frozen linear layer and the constant of its update.

    Attributes:
        layer: A `torch.nn.Linear` or bitsandbytes `Linear4bit` whose parameters do not learn.
        scaling: The factor s; without meaning where there is no update.
    """

    layer: Any
    scaling: float = 1.0

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dense weight of shape [N, K], made anew if it is stored quantised.

        Args:
            dtype: Of the result.
        """
        weight = self.layer.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            dense: Tensor = weight.detach().to(dtype)
            return dense
        return dequantized(weight.data, state, dtype)

    def forward(self, x: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Computes y.

        Args:
            x: Tensor of shape [M, K]; its type is the one of all products.
            a: The matrix A, or None for no update.
            b: The matrix B, or None.

        Returns:
            y of shape [M, N], and ``x Aᵀ`` of shape [M, r], which the backward pass wants back.
        """
        bias = self.layer.bias
        y = torch.nn.functional.linear(x, self.weight(x.dtype), None if bias is None else bias.detach().to(x.dtype))
        if a is None or b is None:
            return y, None
        xa = x @ a.to(x.dtype).t()
        # y is ours alone, so the update may be added in place.
        return y.addmm_(xa, b.to(x.dtype).t(), alpha=self.scaling), xa

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        xa: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        *,
        needs: tuple[bool, bool, bool],
        add_to: Tensor | None = None,
    ) -> Gradients:
        """Computes the gradients.

        Args:
            dy: Tensor of shape [M, N].
            x: The input; None will do where A does not learn.
            xa: What `forward` returned.
            a: The matrix A, or None.
            b: The matrix B, or None.
            needs: Whether the gradients of x, A and B are wanted.
            add_to: A gradient of x from elsewhere, to which this one is added in place.
        """
        dya = da = db = dx = None
        if a is not None and b is not None and xa is not None:
            if needs[0] or needs[1]:
                dya = dy @ b.to(dy.dtype)
            if needs[1] and dya is not None and x is not None:
                da = (dya.t() @ x).to(a.dtype).mul_(self.scaling)
            if needs[2]:
                db = (dy.t() @ xa).to(b.dtype).mul_(self.scaling)
        if needs[0]:
            weight = self.weight(dy.dtype)
            dx = dy @ weight if add_to is None else add_to.addmm_(dy, weight)
            if dya is not None and a is not None:
                dx.addmm_(dya, a.to(dy.dtype), alpha=self.scaling)
        return Gradients(dx, da, db)


def dequantized(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """Unpacks a 4-bit weight.

    Straight into the wanted type: bitsandbytes' own function goes by the type that the weight had before it was
    quantised, and rounds to it on the way.

    Args:
        packed: The stored bytes.
        state: Its bitsandbytes `QuantState`.
        dtype: Of the result.

    Returns:
        Tensor of shape [N, K].
    """
    if use_triton(packed):
        from vlm.kernels import nf4_triton

        if nf4_triton.takes(packed, state):
            return nf4_triton.dequantized(packed, state, dtype)
    from bitsandbytes.functional import dequantize_blockwise

    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2).add_(state.offset)
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax.float(), state.blocksize, state.quant_type, state.shape, dtype
    )
    return dense


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrix products run: autocast's inside of it, else the input's own.

    Args:
        x: An input on the device in question.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
