"""A feed-forward block over frozen, adapted projections as one step of the backward pass.

    gated:   y = down(φ(gate(x)) · up(x))          plain:   y = down(φ(up(x)))

Legend: x [M, H]; g, u [M, I] the outputs of gate and up; φ the activation; each projection as in
`vlm.kernels.frozen_linear`. Kept for the backward pass: x, g and u (plain: x and u). The activation and the product
before `down` are made again there, where the stock block keeps two or three more tensors of width I.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.kernels.frozen_linear import Projection, compute_dtype
from vlm.kernels.swiglu import swiglu, swiglu_backward

# A projection with its matrices A and B, None without an update.
Adapted = tuple[Projection, "Tensor | None", "Tensor | None"]


@dataclass(frozen=True, eq=False)
class _Block:
    up: Projection
    down: Projection
    gate: Projection | None
    activation: Callable[[Tensor], Tensor]

    def inner(self, g: Tensor | None, u: Tensor) -> Tensor:
        """The input of `down`."""
        if g is None:
            return self.activation(u)
        if isinstance(self.activation, torch.nn.SiLU):
            return swiglu(g, u)
        return self.activation(g) * u

    def inner_backward(self, g: Tensor | None, u: Tensor, dh: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gradients of g and u."""
        if g is not None and isinstance(self.activation, torch.nn.SiLU):
            return swiglu_backward(g, u, dh)
        with torch.enable_grad():
            # Whatever the activation is, it differentiates itself.
            inputs = [tensor.detach().requires_grad_() for tensor in (g, u) if tensor is not None]
            h = self.activation(inputs[0]) * inputs[1] if len(inputs) == 2 else self.activation(inputs[0])
            gradients = torch.autograd.grad(h, inputs, dh)
        return (gradients[0], gradients[1]) if len(inputs) == 2 else (None, gradients[0])


class _Enter(torch.autograd.Function):
    """All of the backward pass, and the forward pass up to `down`.

    The output is a token of y's shape without values. So everything is kept before `down` runs, and recomputing a layer
    that ends in this block stops there: a third of the block's products are not made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a_up: Tensor | None,
        b_up: Tensor | None,
        a_down: Tensor | None,
        b_down: Tensor | None,
        a_gate: Tensor | None,
        b_gate: Tensor | None,
        block: _Block,
        shelf: list[Tensor | None],
    ) -> Tensor:
        g, xa_gate = block.gate.forward(x, a_gate, b_gate) if block.gate is not None else (None, None)
        u, xa_up = block.up.forward(x, a_up, b_up)
        shelf[:] = g, u
        ctx.block = block
        kept_x = x if ctx.needs_input_grad[1] or ctx.needs_input_grad[5] else None
        ctx.save_for_backward(kept_x, g, u, xa_up, xa_gate, a_up, b_up, a_down, b_down, a_gate, b_gate)
        return x.new_empty(1).expand(len(x), block.down.layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, xa_up, xa_gate, a_up, b_up, a_down, b_down, a_gate, b_gate = ctx.saved_tensors
        block: _Block = ctx.block
        needs = ctx.needs_input_grad
        h = ha = None
        if needs[3] or needs[4]:
            h = block.inner(g, u)
            ha = h @ a_down.to(h.dtype).t()
        dh, da_down, db_down = block.down.backward(dy, h, ha, a_down, b_down, needs=(True, *needs[3:5]))
        del h
        assert dh is not None
        dg, du = block.inner_backward(g, u, dh)
        del dh
        dx, da_up, db_up = block.up.backward(du, x, xa_up, a_up, b_up, needs=needs[:3])
        del du
        da_gate = db_gate = None
        if block.gate is not None:
            assert dg is not None
            dx, da_gate, db_gate = block.gate.backward(
                dg, x, xa_gate, a_gate, b_gate, needs=(needs[0], *needs[5:7]), add_to=dx
            )
        return dx, da_up, db_up, da_down, db_down, da_gate, db_gate, None, None


class _Leave(torch.autograd.Function):
    """The rest of the forward pass, whose gradient is the token's as it comes."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, a_down: Tensor | None, b_down: Tensor | None, block: _Block, shelf: list[Tensor | None]
    ) -> Tensor:
        g, u = shelf
        assert u is not None
        return block.down.forward(block.inner(g, u), a_down, b_down)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None, None, None, None


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
    block = _Block(up[0], down[0], None if gate is None else gate[0], activation)
    matrices = (*up[1:], *down[1:], *(gate[1:] if gate is not None else (None, None)))
    shelf: list[Tensor | None] = []
    token = _Enter.apply(rows, *matrices, block, shelf)
    detached = (None if matrix is None else matrix.detach() for matrix in down[1:])
    y: Tensor = _Leave.apply(token, *detached, block, shelf)
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
