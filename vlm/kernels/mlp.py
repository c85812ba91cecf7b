"""A feed-forward block over frozen, adapted projections as one step of the backward pass.

    gated:   y = down(φ(gate(x)) · up(x))          plain:   y = down(φ(up(x)))

Legend: x [M, H]; g, u [M, I] the outputs of gate and up; φ the activation; each projection as in
`vlm.kernels.frozen_linear`. Gate and up are one product, and every update is a part of a product
(`vlm.kernels.stacked`). Kept for the backward pass: x with x Aᵀ beside it, and g beside u (plain: u). The activation and
the product before `down` are made again there, where the stock block keeps two or three more tensors of width I. The
backward pass works in one tensor of g's and u's size, in which h, then dh, then the gradients of g and u stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.kernels.activation import activate, activate_backward, name_of
from vlm.kernels.frozen_linear import Projection, compute_dtype
from vlm.kernels.stacked import Matrices, Stacked

# A projection with its matrices A and B, None without an update.
Adapted = tuple[Projection, "Tensor | None", "Tensor | None"]


@dataclass(frozen=True, eq=False)
class _Block:
    """What does not change during a training. `into` is gate and up, or up alone."""

    into: tuple[Projection, ...]
    down: Projection
    activation: Callable[[Tensor], Tensor]

    @property
    def gated(self) -> bool:
        return len(self.into) == 2

    def stacks(self, matrices: tuple[Tensor | None, ...]) -> tuple[Stacked, Stacked]:
        """Both halves of the block. The matrices are A and B of each of `into`, then those of `down`."""
        pairs: list[Matrices] = list(zip(matrices[::2], matrices[1::2], strict=True))
        return Stacked(self.into, tuple(pairs[:-1])), Stacked((self.down,), (pairs[-1],), pads_inputs=True)

    def activate(self, inner: Tensor, out: Tensor) -> None:
        activate(inner, self.activation, gated=self.gated, out=out, name=name_of(self.activation))

    def activate_backward(self, inner: Tensor, gradient: Tensor) -> None:
        activate_backward(inner, self.activation, gated=self.gated, gradient=gradient, name=name_of(self.activation))

    def down_forward(self, inner: Tensor, matrices: tuple[Tensor | None, ...]) -> Tensor:
        """The rest of the forward pass behind g and u."""
        _, below = self.stacks(matrices)
        width, rank, end = below.num_inputs, below.rank, below.num_outputs
        stack = below.matrix(inner)
        wide = inner.new_empty(len(inner), width + rank)
        h = wide[:, :width]
        self.activate(inner, h)
        if rank:
            torch.mm(h, stack[end:, :width].t(), out=wide[:, width:])
        return torch.nn.functional.linear(wide, stack[:end], below.bias(inner.dtype))


class _Enter(torch.autograd.Function):
    """All of the backward pass, and the forward pass up to `down`.

    The output is a token of y's shape without values. So everything is kept before `down` runs, and recomputing a layer
    that ends in this block stops there: a third of the block's products are not made again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: _Block, shelf: list[Tensor], *matrices: Tensor | None) -> Tensor:
        above, _ = block.stacks(matrices)
        end = above.num_outputs * len(block.into)
        stack = above.matrix(x)
        wide = torch.cat((x, x @ stack[end:, : x.shape[1]].t()), 1) if above.rank else x
        inner = torch.nn.functional.linear(wide, stack[:end], above.bias(x.dtype))
        shelf.append(inner)
        ctx.block = block
        ctx.save_for_backward(wide if above.rank else None, inner, *matrices)
        return x.new_empty(1).expand(len(x), block.down.layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wide, inner, *rest = ctx.saved_tensors
        block: _Block = ctx.block
        above, below = block.stacks(tuple(rest))
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        width, rank, end = below.num_inputs, above.rank, above.num_outputs * len(block.into)
        # Where dh comes to stand, and beside it what becomes dg; then the columns of the updates.
        work = dy.new_empty(len(dy), end + rank)
        dh = work[:, end - width : end]

        stack, size = below.matrix(dy), below.num_outputs
        dya = dy @ stack[:size, width:] if below.rank else None
        h = ha = None
        if any(needs[-2:]):
            h = work[:, :width]
            block.activate(inner, h)
            ha = h @ stack[size:, :width].t()
        of_down = below.gradients(dya, dy, h, ha, needs[-2:])
        torch.mm(dy if dya is None else torch.cat((dy, dya), 1), stack[:, :width], out=dh)
        del stack

        d_inner = work[:, :end]
        block.activate_backward(inner, d_inner)
        if not rank and not needs_x:
            return None, None, None, *([None] * len(needs[:-2])), *of_down
        stack, size = above.matrix(dy), above.num_inputs
        x = xa = dya = None
        if rank:
            dya = torch.mm(d_inner, stack[:end, size:], out=work[:, end:])
            x, xa = wide[:, :size], wide[:, size:]
        into = above.gradients(dya, d_inner, x, xa, needs[:-2])
        dx = work @ stack[:, :size] if needs_x else None
        return dx, None, None, *into, *of_down


class _Leave(torch.autograd.Function):
    """The rest of the forward pass, whose gradient is the token's as it comes."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, block: _Block, shelf: list[Tensor], *matrices: Tensor | None) -> Tensor:
        ctx.num_matrices = len(matrices)
        return block.down_forward(shelf.pop(), matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None, None, *([None] * ctx.num_matrices)


def mlp(x: Tensor, up: Adapted, down: Adapted, gate: Adapted | None, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies a feed-forward block.

    Args:
        x: Tensor of shape [..., H].
        up: The projection from H to I.
        down: The projection from I to H.
        gate: The gate's projection from H to I; None for a plain block.
        activation: Applied to the gate's output, or in a plain block to that of `up`; elementwise.

    Returns:
        Tensor of shape [..., H], typed as by `vlm.kernels.lora_linear.lora_linear`.
    """
    rows = x.to(compute_dtype(x)).reshape(-1, x.shape[-1])
    parts = (up, down) if gate is None else (gate, up, down)
    block = _Block(tuple(part[0] for part in parts[:-1]), down[0], activation)
    matrices = [matrix for part in parts for matrix in part[1:]]
    shelf: list[Tensor] = []
    token = _Enter.apply(rows, block, shelf, *matrices)
    detached = (None if matrix is None else matrix.detach() for matrix in matrices)
    y: Tensor = _Leave.apply(token, block, shelf, *detached)
    return y.view(*x.shape[:-1], y.shape[-1])


def mlp_eager(
    x: Tensor, up: Adapted, down: Adapted, gate: Adapted | None, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """The same from plain differentiable operations, as oracle.

    Args:
        x: As above.
        up: As above.
        down: As above.
        gate: As above.
        activation: As above.
    """
    from vlm.kernels.lora_linear import lora_linear_eager

    def apply(adapted: Adapted, inputs: Tensor) -> Tensor:
        return lora_linear_eager(inputs, *adapted)

    inner = activation(apply(up, x)) if gate is None else activation(apply(gate, x)) * apply(up, x)
    return apply(down, inner)
