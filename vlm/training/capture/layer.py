"""One layer of a tower, replayed."""

from __future__ import annotations

import inspect
import logging
import re
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.training.activation import rounded
from vlm.training.capture.inputs import Call, Inputs, Pass, in_flight, power_of_two, read
from vlm.training.capture.stack import MOST_WASTE, Graph, Shape, Stack

_LOGGER = logging.getLogger(__name__)


class Entry:
    """A layer's graphs for one shape."""

    def __init__(self, layer: CapturedLayer, inputs: Inputs, hidden: Tensor, needs_x: bool, shape: Shape) -> None:
        self.layer, self.inputs, self.needs_x, self.shape = layer, inputs, needs_x, shape
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
            x, y = self._apply() if layer.recompute else self._kept or self._apply()
        parameters = [layer.parameters[number] for number in self.used]
        gradients = torch.autograd.grad(y, ([x] if self.needs_x else []) + parameters, self.dy)
        if self.needs_x:
            self.dx.copy_(gradients[0])
        buffers = [layer.buffers[number] for number in self.used]
        if buffers:
            torch._foreach_add_(buffers, list(gradients[int(self.needs_x) :]))
        self._kept = None


def _put(slot: Tensor, value: Tensor) -> None:
    """Brings a value into a slot, zeros behind it, unless it is there already."""
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


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor, entry: Entry, running: Pass) -> Tensor:
        assert entry.forward is not None
        entry.forward.replay()
        ctx.entry, ctx.running, ctx.num_positions = entry, running, hidden.shape[-2]
        return _alias(entry.y, hidden.shape[-2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        entry: Entry = ctx.entry
        _put(entry.dy, dy)
        entry.layer.accumulate(entry)
        ctx.running.done = True
        return (_alias(entry.dx, ctx.num_positions) if entry.needs_x else None), None, None, None


def capturable(layer: torch.nn.Module) -> bool:
    """Whether a layer's work is the same whatever its input's values; experts work as much as they are asked.

    Args:
        layer: Of a tower.
    """
    return not any(re.search("expert|moe", type(module).__name__, re.IGNORECASE) for module in layer.modules())


class CapturedLayer:
    """Stands for a layer's ``forward``.

    Args:
        stack: Of its tower.
        layer: The module.
        stock: Its forward as graphs record it.
        eager: Its forward where there is no graph.
        recompute: Whether the backward pass makes the layer's activations anew.
    """

    def __init__(
        self, stack: Stack, layer: Any, stock: Callable[..., Any], eager: Callable[..., Any], recompute: bool
    ) -> None:
        self.stack, self.layer, self.stock, self.eager, self.recompute = stack, layer, stock, eager, recompute
        self.index = len(stack.layers)
        stack.layers.append(self)
        self.parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        # An adapted layer has its base layer and its two matrices inside; the layer itself counts once.
        self.num_weights = sum(
            getattr(module, "in_features", 0) * getattr(module, "out_features", 0)
            for name, module in layer.named_modules()
            if ".base_layer" not in name and ".lora_" not in name
        )
        self._names = list(inspect.signature(type(layer).forward).parameters)[1:]
        self._num_segments = self._longest = 1
        self._running: weakref.ref[Pass] | None = None
        self.buffers: list[Tensor] = []

    @property
    def in_flight(self) -> bool:
        """Whether the way back of its last pass is still to come."""
        return in_flight(self._running)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer."""
        stack = self.stack
        if stack.disabled or not (self.layer.training and torch.is_grad_enabled()):
            return self.eager(*args, **kwargs)
        ready = self._ready(args, kwargs)
        if isinstance(ready, str):
            stack.reasons[ready] += 1
            return self.eager(*args, **kwargs)
        entry, hidden = ready
        stack.num_replays += 1
        running = Pass()
        self._running = weakref.ref(running)
        entry.inputs.used_by(running)
        return _Replay.apply(hidden, _anchor(), entry, running)

    def _ready(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Entry, Tensor] | str:
        """The graph of these inputs with the inputs in place; else why there is none."""
        call = read(self._names, args, kwargs)
        if isinstance(call, str):
            return f"input {call}"
        hidden, stack = call.hidden, self.stack
        needs_x = hidden.requires_grad
        if not (needs_x or self.parameters):
            return "frozen"
        if 4.0 * self.num_weights * hidden.numel() / hidden.shape[-1] > stack.limit:
            return "large"
        width = hidden.numel() // hidden.shape[-2]
        padded, bounds = self._sizes(call)
        kind = needs_x, hidden.dtype, tuple(hidden.shape[:-2]), _autocast_key(hidden.device.type), call.constants
        reason = stack.enter(self.index, padded, bounds, kind, width)
        if reason is not None:
            return reason
        active = stack.active
        assert active is not None
        # Of several widths in one stack each has its own number of positions.
        if call.ends is not None and padded <= active.num_positions:
            padded = active.num_positions
        sizes = padded, bounds[0], bounds[1]
        key = (*sizes, *kind)
        known = active.entries.get(self.index)
        if known is not None and known[0] == key and not active.capturing:
            entry = known[1]
            if not entry.inputs.fill(call):
                return "called twice"
            _put(entry.x, hidden.detach())
            return entry, hidden
        if not active.capturing:
            stack.forget()
            return "changed within a pass"
        if not stack.fits(padded * width):
            return "wider than the first layer"
        return self._capture(key, call, sizes, needs_x)

    def _sizes(self, call: Call) -> tuple[int, tuple[int, int]]:
        """Positions that a graph is made for, and segments and length of the longest, which only ever grow."""
        num_positions = call.hidden.shape[-2]
        if call.ends is None:
            return num_positions, (0, 0)
        padded = rounded(num_positions)
        self._longest = max(self._longest, power_of_two(call.longest))
        # Padding is cut into segments not longer than the others.
        most = MOST_WASTE * rounded(max(num_positions, self.stack.most_positions))
        needed = len(call.ends) - 1 + -(-most // self._longest)
        self._num_segments = max(self._num_segments, power_of_two(needed))
        return padded, (self._num_segments, self._longest)

    def _capture(self, key: Any, call: Call, sizes: tuple[int, int, int], needs_x: bool) -> tuple[Entry, Tensor] | str:
        stack, hidden = self.stack, call.hidden
        assert stack.active is not None
        try:
            inputs = stack.active.inputs(call, sizes)
            if not inputs.fill(call):
                return "called twice"
            _put(stack.slot("x", self.index, hidden, [*hidden.shape[:-2], sizes[0], hidden.shape[-1]]), hidden.detach())
            entry = Entry(self, inputs, hidden, needs_x, stack.active)
            graph = stack.graph(stack)
            graph.capture(entry.run_forward)
            graph.replay()
            entry.check()
        except RuntimeError as error:
            self._give_up(error)
            return "error"
        entry.forward = graph
        stack.active.entries[self.index] = key, entry
        return entry, hidden

    def accumulate(self, entry: Entry) -> None:
        """The way back, into the parameters' gradients."""
        parameters = [(self.parameters[number], number) for number in entry.used]
        if not self.buffers:
            self._make_buffers()
        ours = all(parameter.grad is self.buffers[number] for parameter, number in parameters)
        if self.buffers and not ours:
            torch._foreach_zero_(self.buffers)
        if entry.backward is None and entry.shape.capturing and not self.stack.disabled:
            graph = self.stack.graph(self.stack)
            try:
                graph.capture(entry.run_backward)
                entry.backward = graph
            except RuntimeError as error:
                self._give_up(error)
                entry.abandon()
            if self.stack.flat is not None:
                self.stack.flat.mark(own for own, _ in parameters)
        if entry.backward is not None:
            entry.backward.replay()
        else:
            entry.run_backward()
        if ours:
            return
        for parameter, number in parameters:
            if parameter.grad is None:
                parameter.grad = self.buffers[number]
            else:
                # Another part of the step ran without a graph.
                parameter.grad += self.buffers[number]

    def _make_buffers(self) -> None:
        given = {} if self.stack.flat is None else self.stack.flat.gradients
        self.buffers = [given[own] if own in given else torch.zeros_like(own) for own in self.parameters]

    def _give_up(self, error: RuntimeError) -> None:
        self.stack.disabled = True
        self.stack.reasons[str(error).splitlines()[0]] += 1
        _LOGGER.warning("layers run without CUDA graphs, which is slower: %s", error)


def _anchor() -> Tensor:
    """Makes the output of a layer belong to the graph even where its input does not."""
    return torch.zeros((), requires_grad=True)


def _autocast_key(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast of the moment, to be entered again, without copies that would outlive a graph."""
    dtype = _autocast_key(device)
    if dtype is None:
        return nullcontext
    return lambda: torch.autocast(device, dtype, cache_enabled=False)
