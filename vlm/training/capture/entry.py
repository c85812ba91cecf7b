"""A layer's graphs for one shape, and their place in autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.training.capture.inputs import Inputs, Pass
from vlm.training.capture.stack import Graph, Shape

if TYPE_CHECKING:
    from vlm.training.capture.layer import CapturedLayer


class Entry:
    """A layer's graphs for one shape."""

    def __init__(self, layer: CapturedLayer, inputs: Inputs, hidden: Tensor, shape: Shape, key: Any) -> None:
        self.layer, self.inputs, self.shape, self.key = layer, inputs, shape, key
        self.needs_x = hidden.requires_grad
        self.autocast = _autocast(hidden.device.type)
        size = [*hidden.shape[:-2], inputs.num_positions, hidden.shape[-1]]
        stack, index = layer.stack, layer.index
        self.x = stack.slot("x", index, hidden, size)
        self.used, like = self._try()
        self._expected: Tensor | None = like
        self.y = stack.slot("x", index + 1, like, size)
        self.dy = stack.slot("dx", index % 2, like, size)
        self.dx = stack.slot("dx", (index + 1) % 2, hidden, size)
        self.forward: Graph | None = None
        self.backward: Graph | None = None
        self._kept: tuple[Tensor, Tensor] | None = None

    def _apply(self) -> tuple[Tensor, Tensor]:
        x = self.x.detach().requires_grad_(self.needs_x)
        with self.autocast():
            return x, self.layer.stock(x, **self.inputs.values)

    def _try(self) -> tuple[list[int], Tensor]:
        """Runs both ways without a graph: kernels are compiled, and it shows which parameters take part."""
        layer = self.layer
        with torch.enable_grad():
            x, y = self._apply()
            if not isinstance(y, Tensor) or y.shape != self.x.shape:
                raise RuntimeError("the layer's output is not like its input")
            wanted = ([x] if self.needs_x else []) + layer.parameters
            found = torch.autograd.grad(y, wanted, torch.zeros_like(y), allow_unused=True)
        first = int(self.needs_x)
        return [number for number, gradient in enumerate(found[first:]) if gradient is not None], y.detach()

    def check(self) -> None:
        """Compares the first replay with what the layer gave without a graph.

        Raises:
            RuntimeError: They differ.
        """
        assert self._expected is not None
        distance, norm = ((self.y - self._expected).float().norm(), self._expected.float().norm())
        self._expected = None
        # The same kernels over the same numbers. A step that is no number is not the graph's fault.
        if distance > 1e-2 * norm:
            raise RuntimeError(f"a replayed layer is {float(distance / norm):.1%} off")

    def abandon(self) -> None:
        """Drops what the way forward kept, since part of the way back may have used it up."""
        self._kept = None

    def drop(self) -> None:
        """Drops the graphs if the layer's way back needs none: where nothing is kept, its input is enough."""
        if self.layer.recompute:
            self.forward = self.backward = None

    def run_forward(self) -> None:
        """The layer from slot to slot."""
        with torch.no_grad() if self.layer.recompute else torch.enable_grad():
            x, y = self._apply()
        if not self.layer.recompute:
            self._kept = x, y
        self.y.copy_(y.detach())

    def run_backward(self) -> None:
        """The way back; adds to the gradients' buffers."""
        layer = self.layer
        with torch.enable_grad():
            x, y = self._kept or self._apply()
        parameters = [layer.parameters[number] for number in self.used]
        gradients = torch.autograd.grad(y, ([x] if self.needs_x else []) + parameters, self.dy)
        if self.needs_x:
            self.dx.copy_(gradients[0])
        buffers = [layer.buffers[number] for number in self.used]
        if buffers:
            torch._foreach_add_(buffers, list(gradients[int(self.needs_x) :]))
        self._kept = None


def put(slot: Tensor, value: Tensor) -> None:
    """Brings a value into a slot, zeros behind it, unless it is there already.

    Args:
        slot: Tensor of shape [(batch,) positions, width].
        value: The same, of as many positions or fewer.
    """
    if value.data_ptr() == slot.data_ptr():
        return
    count = value.shape[-2]
    slot.narrow(-2, 0, count).copy_(value)
    if count < slot.shape[-2]:
        slot.narrow(-2, count, slot.shape[-2] - count).zero_()


def _alias(slot: Tensor, num_positions: int) -> Tensor:
    """The first positions of a slot as a tensor of its own, which is no view of another."""
    part = slot.narrow(-2, 0, num_positions)
    with torch.no_grad():
        return part.new_empty(0).set_(part.untyped_storage(), part.storage_offset(), part.shape, part.stride())


class Replay(torch.autograd.Function):
    """A layer as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor, entry: Entry, running: Pass) -> Tensor:
        """Replays the way forward.

        Args:
            ctx: Of autograd.
            hidden: Tensor of shape [(batch,) positions, width], which lies in the graph's slot already.
            anchor: Needs a gradient, so that there is a way back even where the input needs none.
            entry: The graphs.
            running: The pass.

        Returns:
            A tensor like `hidden`.
        """
        assert entry.forward is not None
        entry.forward.replay()
        ctx.entry, ctx.running, ctx.num_positions = entry, running, hidden.shape[-2]
        return _alias(entry.y, hidden.shape[-2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The way back; the layer's parameters get their gradients meanwhile."""
        entry: Entry = ctx.entry
        put(entry.dy, dy)
        entry.layer.accumulate(entry)
        ctx.running.done = True
        stack = entry.layer.stack
        if stack.disabled and stack.has_graphs and not stack.in_flight:
            stack.release()
        return (_alias(entry.dx, ctx.num_positions) if entry.needs_x else None), None, None, None


def autocast_key(device: str) -> torch.dtype | None:
    """The precision of the autocast of the moment; None without one.

    Args:
        device: Its type.
    """
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast of the moment, to be entered again, without copies that would outlive a graph."""
    dtype = autocast_key(device)
    if dtype is None:
        return nullcontext
    return lambda: torch.autocast(device, dtype, cache_enabled=False)
