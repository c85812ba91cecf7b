"""One layer of a tower, replayed."""

from __future__ import annotations

import inspect
import logging
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlm.training.activation import rounded
from vlm.training.capture.entry import Entry, Replay, autocast_key, put
from vlm.training.capture.inputs import Call, NoGraphError, Pass, in_flight, power_of_two, read
from vlm.training.capture.stack import MOST_WASTE, Shape, Stack

_LOGGER = logging.getLogger(__name__)


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
        try:
            call = read(self._names, args, kwargs)
            entry = self._entry(call)
        except NoGraphError as reason:
            stack.reasons[str(reason)] += 1
            failed = stack.disabled
        else:
            stack.num_replays += 1
            running = Pass()
            self._running = weakref.ref(running)
            entry.inputs.used_by(running)
            return Replay.apply(call.hidden, _anchor(), entry, running)
        if failed:
            # Only here is nothing left of the attempt, whose error held on to what it had allocated.
            stack.release()
        return self.eager(*args, **kwargs)

    def _entry(self, call: Call) -> Entry:
        """The graph of these inputs, with the inputs in place.

        Raises:
            NoGraphError: There is none.
        """
        hidden, stack = call.hidden, self.stack
        needs_x = hidden.requires_grad
        if not (needs_x or self.parameters):
            raise NoGraphError("frozen")
        if 4.0 * self.num_weights * hidden.numel() / hidden.shape[-1] > stack.limit:
            raise NoGraphError("large")
        width = hidden.numel() // hidden.shape[-2]
        padded, bounds = self._sizes(call)
        kind = needs_x, hidden.dtype, tuple(hidden.shape[:-2]), autocast_key(hidden.device.type), call.constants
        shape = stack.enter(self.index, padded, bounds, kind, width)
        # Of several widths in one stack each has its own number of positions.
        if call.ends is not None and padded <= shape.num_positions:
            padded = shape.num_positions
        sizes = padded, *bounds
        key = (*sizes, *kind)
        if shape.capturing:
            if not stack.fits(padded * width):
                raise NoGraphError("wider than the first layer")
            return self._capture(shape, key, call, sizes)
        entry = shape.entries.get(self.index)
        if entry is None or entry.key != key:
            stack.forget()
            raise NoGraphError("changed within a pass")
        entry.inputs.fill(call)
        put(entry.x, hidden.detach())
        return entry

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

    def _capture(self, shape: Shape, key: Any, call: Call, sizes: tuple[int, int, int]) -> Entry:
        stack, hidden = self.stack, call.hidden
        try:
            inputs = shape.inputs(call, sizes)
            inputs.fill(call)
            put(stack.slot("x", self.index, hidden, [*hidden.shape[:-2], sizes[0], hidden.shape[-1]]), hidden.detach())
            entry = Entry(self, inputs, hidden, shape, key)
            graph = stack.graph(stack)
            graph.capture(entry.run_forward)
            graph.replay()
            entry.check()
        except RuntimeError as error:
            self._give_up(error)
            raise NoGraphError("error") from error
        entry.forward = graph
        shape.entries[self.index] = entry
        return entry

    def accumulate(self, entry: Entry) -> None:
        """The way back, into the parameters' gradients."""
        if not self.buffers:
            self._make_buffers()
        used = [(self.parameters[number], self.buffers[number]) for number in entry.used]
        # Each buffer adds up from zero until it is its parameter's gradient.
        others = [(parameter, buffer) for parameter, buffer in used if parameter.grad is not buffer]
        if others:
            torch._foreach_zero_([buffer for _, buffer in others])
        if entry.backward is None and entry.shape.capturing and not self.stack.disabled:
            graph = self.stack.graph(self.stack)
            try:
                graph.capture(entry.run_backward)
                entry.backward = graph
            except RuntimeError as error:
                self._give_up(error)
                entry.abandon()
            if self.stack.disabled:
                self.stack.release()
            if self.stack.flat is not None:
                self.stack.flat.mark(own for own, _ in used)
        if entry.backward is not None:
            entry.backward.replay()
        else:
            entry.run_backward()
        for parameter, buffer in others:
            if parameter.grad is None:
                parameter.grad = buffer
            else:
                # Another part of the step ran without a graph.
                parameter.grad += buffer

    def _make_buffers(self) -> None:
        given = {} if self.stack.flat is None else self.stack.flat.gradients
        self.buffers = [given[own] if own in given else torch.zeros_like(own) for own in self.parameters]

    def _give_up(self, error: RuntimeError) -> None:
        # What one stack has given back would soon be another's.
        self.stack.give_up(companions=isinstance(error, torch.OutOfMemoryError))
        self.stack.reasons[str(error).splitlines()[0]] += 1
        # Its text: whoever keeps the record would keep, through the error's frames, what they had allocated.
        _LOGGER.warning("layers run without CUDA graphs, which is slower: %s", str(error))


def _anchor() -> Tensor:
    """Makes the output of a layer belong to the graph even where its input does not."""
    return torch.zeros((), requires_grad=True)
