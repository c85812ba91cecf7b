"""Frozen projections of one input as one matrix, with their updates at its border, for `vlm.kernels.mlp`.

For two projections, say gate and up (arithmetic and legend: `vlm.kernels.frozen_linear`):

        │ W₁  s₁B₁   0   │      y = [x, x A₁ᵀ, x A₂ᵀ] · (upper rows)ᵀ
    S = │ W₂   0    s₂B₂ │      dx = [dy₁, dy₂, s₁ dy₁B₁, s₂ dy₂B₂] · (left columns)
        │ A₁             │
        │ A₂             │      y = [y₁, y₂]

One product does the work of two and of the passes that add their updates; x and dy are read once. Widths that are no
multiple of 8 would send a GPU to products of half the speed: outputs and inputs of the stack are padded with zeros, and
so are the columns of the updates together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.kernels.frozen_linear import ALIGNED_VALUES, Projection, product

# Whole tiles of a matrix product are faster than the least that is aligned.
_TILE_VALUES = 64

# The matrices A and B of one projection, None without an update.
Matrices = tuple["Tensor | None", "Tensor | None"]


def padded_width(width: int) -> int:
    """The width at which products run: the same where rows start at multiples of 16 bytes.

    Args:
        width: Of a projection's output or input.
    """
    return width if width % ALIGNED_VALUES == 0 else -(-width // _TILE_VALUES) * _TILE_VALUES


@dataclass(frozen=True, eq=False)
class Stacked:
    """Projections of one input.

    Attributes:
        projections: All with the same numbers of inputs and of outputs.
        matrices: Their matrices A and B.
        pads_inputs: Whether inputs are padded too; outputs always are.
    """

    projections: tuple[Projection, ...]
    matrices: tuple[Matrices, ...]
    pads_inputs: bool = False

    @property
    def num_outputs(self) -> int:
        """Rows of one projection in the stack."""
        width: int = self.projections[0].layer.out_features
        # Where inputs are padded, the outputs leave the block and keep their number.
        return width if self.pads_inputs else padded_width(width)

    @property
    def num_inputs(self) -> int:
        """Columns of the weights in the stack."""
        width: int = self.projections[0].layer.in_features
        return padded_width(width) if self.pads_inputs else width

    @property
    def rank(self) -> int:
        """Columns of the updates together, padded; 0 without any."""
        total = sum(len(a) for a, _ in self.matrices if a is not None)
        return -(-total // ALIGNED_VALUES) * ALIGNED_VALUES

    def matrix(self, like: Tensor) -> Tensor:
        """The stack S, [outputs of all + rank, inputs + rank]. Its lower right corner holds no values.

        Args:
            like: A tensor of the wanted type and device.
        """
        height, width, rank = self.num_outputs, self.num_inputs, self.rank
        end = height * len(self.projections)
        only = self.projections[0]
        if rank == 0 and (end, width) == (only.layer.out_features, only.layer.in_features):
            # One layer as it is: a dense weight is not even copied.
            return only.weight(like.dtype)
        stack = like.new_empty(end + rank, width + rank)
        used = sum(len(a) for a, _ in self.matrices if a is not None)
        if rank and (len(self.projections) > 1 or used < rank or height > self.projections[0].layer.out_features):
            # Beside every B.
            stack[:end, width:].zero_()
        if used < rank:
            stack[end + used :, :width].zero_()
        column = 0
        for index, (projection, (a, b)) in enumerate(zip(self.projections, self.matrices, strict=True)):
            num_outputs, num_inputs = projection.layer.out_features, projection.layer.in_features
            top = index * height
            projection.write_weight(stack[top : top + num_outputs, :num_inputs])
            if num_outputs < height:
                stack[top + num_outputs : top + height, :width].zero_()
            if a is None or b is None:
                continue
            columns = slice(width + column, width + column + len(a))
            torch.mul(b.detach(), projection.scaling, out=stack[top : top + num_outputs, columns])
            stack[end + column : end + column + len(a), :num_inputs].copy_(a.detach())
            column += len(a)
        num_inputs = self.projections[0].layer.in_features
        if num_inputs < width:
            stack[:, num_inputs:width].zero_()
        return stack

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The biases beside each other, padded like the outputs; None without any.

        Args:
            dtype: Of the result.
        """
        biases = [projection.bias(dtype) for projection in self.projections]
        if all(bias is None for bias in biases):
            return None
        if len(biases) == 1 and biases[0] is not None and len(biases[0]) == self.num_outputs:
            return biases[0]
        if all(bias is not None and len(bias) == self.num_outputs for bias in biases):
            return torch.cat([bias for bias in biases if bias is not None])
        device = next(bias.device for bias in biases if bias is not None)
        whole = torch.zeros(len(biases), self.num_outputs, dtype=dtype, device=device)
        for row, bias in zip(whole, biases, strict=True):
            if bias is not None:
                row[: len(bias)].copy_(bias)
        return whole.view(-1)

    def gradients(
        self, dya: Tensor | None, dy: Tensor, x: Tensor | None, xa: Tensor | None, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of all A and B, in the order of `matrices`.

        Args:
            dya: Tensor of shape [M, rank], the products s · dy B.
            dy: Tensor of shape [M, outputs of all]; rows may lie apart, as in all of these.
            x: Tensor of shape [M, inputs]; None will do where no A learns.
            xa: Tensor of shape [M, rank], the products x Aᵀ; None will do where no B learns.
            needs: Which are wanted, in the same order.
        """
        found: list[Tensor | None] = []
        # Parameters share one type, that of the first.
        dtype = next((a.dtype for a, _ in self.matrices if a is not None), dy.dtype)
        all_a = product(dya.t(), x, dtype) if any(needs[::2]) and dya is not None and x is not None else None
        # All outputs by all columns in one product: what is off the diagonal costs less than reading dy twice.
        all_b = product(dy.t(), xa, dtype) if any(needs[1::2]) and xa is not None else None
        column = 0
        for index, (projection, (a, b)) in enumerate(zip(self.projections, self.matrices, strict=True)):
            rank = 0 if a is None else len(a)
            columns, top = slice(column, column + rank), index * self.num_outputs
            da = db = None
            if all_a is not None and a is not None and needs[2 * index]:
                da = all_a[columns, : a.shape[1]]
            if all_b is not None and b is not None and needs[2 * index + 1]:
                part = all_b[top : top + len(b), columns]
                db = part.contiguous() if projection.scaling == 1 else part * projection.scaling
            found += [da, db]
            column += rank
        return found
