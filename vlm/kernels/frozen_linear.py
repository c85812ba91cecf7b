"""Arithmetic of a frozen linear layer with a LoRA update, in parts, for the autograd functions beside this file.

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ                      Hu et al. 2021, "LoRA"
    dx = dy W + s · (dy B) A     dA = s · (dy B)ᵀ x     dB = s · dyᵀ (x Aᵀ)

Legend: x [M, K] inputs, y [M, N] outputs, W [N, K] frozen, b [N] frozen, A [r, K] and B [N, r] trained, s the scaling.

W is stored dense or in NF4. A dense copy of an NF4 weight lives from its dequantisation to the end of the matrix product
and no longer: the backward pass makes it again, which costs about 4 % of the product on a GPU at 12,000 tokens.

Adding an update of rank r to a result is one more pass over all of it, bound by memory. Where the other side of the
product is narrower, the update goes in there instead, as r more terms of the same sums: y = [x, x Aᵀ] [W, s B]ᵀ and
dx = [dy, s dy B] [W; A]. The weight is written anew anyway, with room for a border; nothing is rounded once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm.kernels.triton_use import use_triton

# Fast matrix products on a GPU want rows that start at multiples of 16 bytes.
ALIGNED_VALUES = 8


class Gradients(NamedTuple):
    """What the backward pass of a projection gives; None where nobody asked."""

    x: Tensor | None
    """Tensor of shape [M, K]."""
    a: Tensor | None
    """Tensor of shape [r, K] in A's own type."""
    b: Tensor | None
    """Tensor of shape [N, r] in B's own type."""


class Update(NamedTuple):
    """What a projection's forward pass made of its update, in the type of its products."""

    a: Tensor
    """A of shape [r, K]."""
    b: Tensor
    """s · B of shape [N, r]."""
    xa: Tensor
    """x Aᵀ of shape [M, r]."""


@dataclass(frozen=True, eq=False)
class Projection:
    """A frozen linear layer and the constant of its update.

    Attributes:
        layer: A `torch.nn.Linear` or bitsandbytes `Linear4bit` whose parameters do not learn.
        scaling: The factor s; without meaning where there is no update.
    """

    layer: Any
    scaling: float = 1.0

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is made anew for every product."""
        return getattr(self.layer.weight, "quant_state", None) is not None

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

    def write_weight(self, out: Tensor) -> None:
        """Writes the dense weight.

        Args:
            out: Tensor of shape [N, K], whose rows may lie apart.
        """
        weight = self.layer.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            out.copy_(weight.detach())
        else:
            dequantize_into(weight.data, state, out)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The bias of shape [N], or None.

        Args:
            dtype: Of the result.
        """
        bias = self.layer.bias
        return None if bias is None else bias.detach().to(dtype)

    def forward(self, x: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Update | None]:
        """Computes y.

        Args:
            x: Tensor of shape [M, K]; its type is the one of all products.
            a: The matrix A, or None for no update.
            b: The matrix B, or None.

        Returns:
            y of shape [M, N], and what the backward pass wants back of the update.
        """
        bias = self.bias(x.dtype)
        if a is None or b is None:
            return torch.nn.functional.linear(x, self.weight(x.dtype), bias), None
        narrow_a, narrow_b = a.detach().to(x.dtype), scaled(b, self.scaling, x.dtype)
        xa = x @ narrow_a.t()
        (num_outputs, rank), num_inputs = narrow_b.shape, x.shape[1]
        if num_inputs < num_outputs and self._takes_border(num_inputs, rank):
            weight = x.new_empty(num_outputs, num_inputs + rank)
            self.write_weight(weight[:, :num_inputs])
            weight[:, num_inputs:].copy_(narrow_b)
            y = torch.nn.functional.linear(torch.cat((x, xa), 1), weight, bias)
        else:
            # y is ours alone, so the update may be added in place.
            y = torch.nn.functional.linear(x, self.weight(x.dtype), bias).addmm_(xa, narrow_b.t())
        return y, Update(narrow_a, narrow_b, xa)

    def backward(
        self, dy: Tensor, x: Tensor | None, update: Update | None, *, needs: tuple[bool, bool, bool], dtype: torch.dtype
    ) -> Gradients:
        """Computes the gradients.

        Args:
            dy: Tensor of shape [M, N].
            x: The input; None will do where A does not learn.
            update: What `forward` returned.
            needs: Whether the gradients of x, A and B are wanted.
            dtype: Type of A and B.
        """
        dya = da = db = dx = None
        if update is not None:
            if needs[0] or needs[1]:
                dya = dy @ update.b
            if needs[1] and dya is not None and x is not None:
                da = product(dya.t(), x, dtype)
            if needs[2]:
                db = product(dy.t(), update.xa, dtype)
                if self.scaling != 1:
                    db.mul_(self.scaling)
        if not needs[0]:
            return Gradients(None, da, db)
        if update is None or dya is None:
            return Gradients(dy @ self.weight(dy.dtype), da, db)
        rank, num_inputs = update.a.shape
        num_outputs = dy.shape[1]
        if num_outputs < num_inputs and self._takes_border(num_outputs, rank):
            weight = dy.new_empty(num_outputs + rank, num_inputs)
            self.write_weight(weight[:num_outputs])
            weight[num_outputs:].copy_(update.a)
            dx = torch.cat((dy, dya), 1) @ weight
        else:
            dx = (dy @ self.weight(dy.dtype)).addmm_(dya, update.a)
        return Gradients(dx, da, db)

    def _takes_border(self, width: int, rank: int) -> bool:
        # A stored dense weight would have to be copied for it.
        return self.is_quantized and width % ALIGNED_VALUES == 0 and rank % ALIGNED_VALUES == 0


def scaled(b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """The matrix s · B, rounded once.

    Args:
        b: Tensor of shape [N, r].
        scaling: The factor s.
        dtype: Of the result.
    """
    return torch.mul(b.detach(), scaling, out=torch.empty(b.shape, dtype=dtype, device=b.device))


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix product in the type of a parameter whose gradient it is.

    Args:
        left: Tensor of shape [I, J].
        right: Tensor of shape [J, K].
        dtype: Of the result.
    """
    # An AMD card is a CUDA device to PyTorch, too, but its products have no such form.
    is_nvidia = left.is_cuda and torch.version.hip is None
    if dtype == torch.float32 and is_nvidia and left.dtype in (torch.bfloat16, torch.float16):
        # The sums are in float32 already.
        wide: Tensor = torch.mm(left, right, out_dtype=dtype)
        return wide
    return (left @ right).to(dtype)


def dequantized(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """Unpacks a 4-bit weight.

    Args:
        packed: The stored bytes.
        state: Its bitsandbytes `QuantState`.
        dtype: Of the result.

    Returns:
        Tensor of shape [N, K].
    """
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    dequantize_into(packed, state, out)
    return out


def dequantize_into(packed: Tensor, state: Any, out: Tensor) -> None:
    """Unpacks a 4-bit weight into memory that is there.

    Straight into its type: bitsandbytes' own function goes by the type that the weight had before it was quantised, and
    rounds to it on the way.

    Args:
        packed: The stored bytes; of any type, as long as these are what it holds.
        state: Its bitsandbytes `QuantState`.
        out: Tensor of shape [N, K], whose rows may lie apart.
    """
    if packed.dtype != torch.uint8:
        packed = packed.view(torch.uint8)
    if use_triton(packed):
        from vlm.kernels import nf4_triton

        if nf4_triton.takes(packed, state):
            nf4_triton.dequantize_into(packed, state, out)
            return
    from bitsandbytes.functional import dequantize_blockwise

    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2).add_(state.offset)
    out.copy_(
        torch.ops.bitsandbytes.dequantize_4bit.default(
            packed, absmax.float(), state.blocksize, state.quant_type, state.shape, out.dtype
        )
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrix products run: autocast's inside of it, else the input's own.

    Args:
        x: An input on the device in question.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
