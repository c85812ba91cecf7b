"""Layers as CUDA graphs: a layer's hundred launches become one, forward and backward.

At a few thousand tokens a step of a small model is the host's time, not the GPU's: Qwen2-VL-2B over eight formulas takes
0.33 s of which the GPU works 0.09 s. A graph replays fixed shapes at fixed addresses, so

    hidden [1, T, H]  ── copied, padded to T' ──▶ slot 0 ─ graph ─▶ slot 1 ─ graph ─▶ … ─▶ slot L ── first T ──▶ norm
    cos, sin, ends    ── copied once for all layers ──────┘                                              backward likewise

- T' is T rounded up by an eighth at most. The padding is a segment of its own that nothing attends to and whose gradient
  is zero, and never NaN.
- Inputs of layers lie in slots that all shapes share; so does what a layer keeps, since memory of one capture is given to
  the next: of one stack of layers, only one shape is in flight.
- Gradients are added to buffers inside the graph; `grad` of a parameter is such a buffer.
- A layer is captured where its shape comes for the second time, and runs as it was where anything is in the way: inputs
  that are not known here, a stack called twice in one pass, a shape too many, an error while capturing.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.packing.attention import Segments
from vlm.training.activation import ActivationPlan

_LOGGER = logging.getLogger(__name__)
# A layer that computes for 5 ms, both ways, is longer at work than its launches take.
LAUNCH_BOUND_OPERATIONS = 4e12
# Shapes of one layer that are kept as graphs; each costs some megabytes of launches.
_MOST_SHAPES = 24


class Graph:
    """One CUDA graph."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._graph: Any = None

    def capture(self, function: Callable[[], None]) -> None:
        """Records what a function launches, without running it."""
        stack, current = self._stack, torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        stack.stream.wait_stream(current)
        with torch.cuda.stream(stack.stream):
            # Other threads (of a data loader, say) go on meanwhile.
            graph.capture_begin(pool=stack.pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        current.wait_stream(stack.stream)
        self._graph = graph

    def replay(self) -> None:
        """Launches it on the current stream."""
        self._graph.replay()


class Rerun(Graph):
    """The same without a GPU: runs the function again. For tests."""

    def capture(self, function: Callable[[], None]) -> None:
        """Keeps the function."""
        self._graph = function

    def replay(self) -> None:
        """Runs it."""
        self._graph()


@dataclass(frozen=True)
class _Call:
    """The inputs of one call of a layer."""

    hidden: Tensor
    constants: tuple[tuple[str, Any], ...]
    """What is no tensor, by name; part of the shape."""
    along: dict[str, tuple[Tensor, int]]
    """Tensors with a dimension of tokens, by name, and that dimension."""
    ends: Tensor | None
    """Ends of segments; None where the shape is taken as it is."""
    ends_name: str
    lengths: Sequence[int] | None
    longest: int

    @property
    def sources(self) -> tuple[Tensor, ...]:
        own = [tensor for tensor, _ in self.along.values()]
        return (*own, self.ends) if self.ends is not None else tuple(own)


_BOUNDARIES = ("cu_seq_lens_", "max_length_")
_ALONG_TOKENS = {"position_embeddings": -2, "position_ids": -1}


def _read(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> _Call | str:
    """Sorts a layer's inputs; a name where one is not known."""
    values = dict(zip(names, args, strict=False)) | kwargs
    if any(isinstance(value, Segments) for value in values.values()):
        # Who gives segments gives them instead of these.
        values = {name: value for name, value in values.items() if not name.startswith(_BOUNDARIES)}
    hidden = values.pop("hidden_states", None)
    if not isinstance(hidden, Tensor) or hidden.ndim not in (2, 3):
        return "hidden_states"
    along: dict[str, tuple[Tensor, int]] = {}
    constants = []
    ends, ends_name, lengths, longest = None, "", None, 0
    for name, value in values.items():
        if isinstance(value, Segments):
            if value.queries is not None or value.keys is not None or value.ends_k is not None:
                return name
            ends, ends_name, lengths = value.ends_q, name, value.lengths_q
            longest = max(lengths, default=1)
            constants.append((name, value.causal))
        elif name == "cu_seqlens" and isinstance(value, Tensor) and isinstance(values.get("max_seqlen"), int):
            ends, ends_name, longest = value, name, values["max_seqlen"]
        elif name == "max_seqlen" and "cu_seqlens" in values:
            continue
        elif isinstance(value, tuple) and name in _ALONG_TOKENS and all(isinstance(own, Tensor) for own in value):
            along |= {f"{name}.{index}": (own, _ALONG_TOKENS[name]) for index, own in enumerate(value)}
        elif isinstance(value, Tensor):
            if value.numel() == 0:
                constants.append((name, tuple(value.shape)))
            elif name in _ALONG_TOKENS:
                along[name] = (value, _ALONG_TOKENS[name])
            else:
                return name
        elif value is None or isinstance(value, bool | int | float | str):
            constants.append((name, value))
        else:
            return name
    num_tokens = hidden.shape[-2]
    if any(tensor.requires_grad or tensor.shape[where] != num_tokens for tensor, where in along.values()):
        return "positions"
    if ends is not None and hidden.numel() != num_tokens * hidden.shape[-1]:
        return "a batch of packed rows"
    return _Call(hidden, tuple(constants), along, ends, ends_name, lengths, longest)


def rounded(number: int) -> int:
    """The number of positions that a graph is made for: up by an eighth at most, in steps of 64 at least.

    Args:
        number: Of positions.
    """
    step = max(64, 1 << max(0, number.bit_length() - 4))
    return -(-number // step) * step


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


class _Inputs:
    """Copies, at fixed addresses, of what all layers of a kind are given."""

    def __init__(self, call: _Call, num_positions: int, num_segments: int, longest: int) -> None:
        self.num_positions, self.longest = num_positions, longest
        self._sources: tuple[Tensor, ...] = ()
        self._users: list[weakref.ref[_Pass]] = []
        self._along = {
            name: (_padded(tensor, where, num_positions), where) for name, (tensor, where) in call.along.items()
        }
        self._ends: Tensor | None = None
        self._lengths: list[int] = []
        device = call.hidden.device
        self.values: dict[str, Any] = dict(call.constants)
        for name, _ in call.constants:
            if isinstance(self.values[name], tuple):  # the shape of a tensor without values
                self.values[name] = torch.empty(self.values[name], device=device)
        for name, (tensor, _) in self._along.items():
            outer, dot, _index = name.partition(".")
            self.values[outer] = (*self.values.get(outer, ()), tensor) if dot else tensor
        if call.ends is not None:
            self._ends = torch.zeros(num_segments + 1, dtype=call.ends.dtype, device=device)
            self._steps = torch.arange(1, num_segments + 1, dtype=call.ends.dtype, device=device) * longest
            if call.lengths is None:
                self.values |= {call.ends_name: self._ends, "max_seqlen": longest}
            else:
                # The kernel asks for the greatest length and the sum only.
                whole, rest = divmod(num_positions, longest)
                self._lengths = [longest] * whole + ([rest] if rest else [])
                causal = self.values.pop(call.ends_name)
                self.values[call.ends_name] = Segments(self._ends, self._lengths, causal=causal)

    def fill(self, call: _Call) -> bool:
        """Takes over a call's values.

        Returns:
            False where the values before are still waited for.
        """
        sources = call.sources
        if len(sources) == len(self._sources) and all(map(_same, sources, self._sources)):
            return True
        self._users = [user for user in self._users if _in_flight(user)]
        if self._users:
            return False
        num_positions = call.hidden.shape[-2]
        for name, (tensor, where) in call.along.items():
            self._along[name][0].narrow(where, 0, num_positions).copy_(tensor)
        if call.ends is not None:
            assert self._ends is not None
            filled = len(call.ends)
            self._ends[:filled].copy_(call.ends)
            torch.add(self._steps[: len(self._ends) - filled], num_positions, out=self._ends[filled:])
            self._ends[filled:].clamp_(max=self.num_positions)
            if self._lengths and not call.hidden.is_cuda:
                # Without the kernel, segments are cut by their lengths.
                self._lengths[:] = [length for length in self._ends.diff().tolist() if length]
        self._sources = sources
        return True

    def used_by(self, running: _Pass) -> None:
        self._users.append(weakref.ref(running))

    def holds(self, call: _Call) -> bool:
        return len(call.sources) == len(self._sources) and all(map(_same, call.sources, self._sources))


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other


def _padded(tensor: Tensor, where: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[where] = size
    return tensor.new_zeros(shape)


class _Pass:
    """One way of a layer forward, until its way back is done."""

    done = False


def _in_flight(reference: weakref.ref[_Pass] | None) -> bool:
    running = None if reference is None else reference()
    return running is not None and not running.done


class _Shape:
    """The graphs of one shape: what one pass through the stack captured, all of it or nothing.

    What a layer keeps for its way back lies in the graphs' common memory, where only the order of one whole pass says who
    may use which part when. So a layer is never captured into the graphs of an earlier pass.
    """

    def __init__(self) -> None:
        self.entries: dict[int, tuple[Any, _Entry]] = {}
        self.capturing = True
        self._inputs: dict[Any, list[_Inputs]] = {}

    def inputs(self, call: _Call, sizes: tuple[int, int, int]) -> _Inputs:
        """The copies that hold this call's values, or new ones."""
        key = sizes, call.constants, tuple((name, own.shape[:-2]) for name, (own, _) in call.along.items())
        known = self._inputs.setdefault(key, [])
        for inputs in known:
            if inputs.holds(call):
                return inputs
        known.append(_Inputs(call, *sizes))
        return known[-1]

    @property
    def complete(self) -> bool:
        return all(entry.backward is not None for _, entry in self.entries.values())


class Stack:
    """What the layers of a tower share.

    Args:
        graph: Makes a graph.
        limit: Operations of a layer, both ways, above which it is not captured: there the host is ahead anyway.
        most_positions: Positions of the largest row to come, as far as known: a larger one throws away all graphs.

    Attributes:
        gradients: Where gradients of parameters are to be, for those that have a place.
        num_replays: Calls that were replayed.
        reasons: Why the others ran without a graph, and how many.
    """

    def __init__(self, graph: type[Graph] = Graph, limit: float = float("inf"), most_positions: int = 0) -> None:
        self.graph, self.limit, self.most_positions = graph, limit, most_positions
        self.num_replays = 0
        self.gradients: dict[Tensor, Tensor] = {}
        self.reasons: Counter[str] = Counter()
        self.layers: list[CapturedLayer] = []
        self.disabled = False
        self.active: _Shape | None = None
        self._position = -1
        self._seen: Counter[Any] = Counter()
        self._shapes: dict[Any, _Shape] = {}
        self._active_key: Any = None
        self._capacity = 0
        self._slots: dict[Any, Tensor] = {}
        self._pool: Any = None
        self._stream: Any = None

    @property
    def pool(self) -> Any:
        """The memory of all graphs."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    @property
    def stream(self) -> Any:
        """Where graphs are recorded."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
            with torch.cuda.stream(self._stream):
                # Workspaces of the matrix library, which must not be made while recording.
                small = torch.ones(16, 16, device="cuda", dtype=torch.bfloat16)
                torch.nn.functional.linear(small, small, small[0])
            self._stream.synchronize()
        return self._stream

    def enter(self, index: int, key: Any, num_positions: int, width: int) -> str | None:
        """Says that a layer is called; the first of a pass settles which graphs the pass takes.

        Args:
            index: The layer's.
            key: Its shape.
            num_positions: Positions of its padded input.
            width: Values of a position.

        Returns:
            Why this pass has no graphs; None if it has.
        """
        first, self._position = index <= self._position or self._position < 0, index
        if not first:
            return None if self.active is not None else "pass without graphs"
        self.active = None
        if any(layer.in_flight for layer in self.layers):
            return "called twice"
        shape = self._shapes.get((index, key))
        if shape is not None and not shape.complete:
            # A pass that was broken off.
            del self._shapes[index, key]
            shape = None
        if shape is None:
            self._seen[index, key] += 1
            if self._seen[index, key] < 2:
                return "new shape"
            if num_positions * width > self._capacity:
                self.clear()
                self._capacity = max(num_positions, rounded(self.most_positions)) * width
            if len(self._shapes) >= _MOST_SHAPES:
                return "too many shapes"
            if not self._shapes:
                # Common memory lives as long as one of its graphs.
                self._pool = None
            shape = self._shapes[index, key] = _Shape()
        else:
            shape.capturing = False
        self.active, self._active_key = shape, (index, key)
        return None

    def fits(self, num_values: int) -> bool:
        """Whether slots hold so many values."""
        return num_values <= self._capacity

    def forget(self) -> None:
        """Has the shape of this pass captured anew when it comes again."""
        self._shapes.pop(self._active_key, None)
        self.active = None

    def clear(self) -> None:
        """Throws away all graphs."""
        self._shapes.clear()
        self._slots.clear()
        self._capacity = 0

    def slot(self, kind: str, index: int, like: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of a shape at the fixed address of a layer's input ("x") or gradient ("dx")."""
        key = kind, index, like.dtype
        if key not in self._slots:
            # Zeros: what is beyond a row must never be NaN.
            self._slots[key] = torch.zeros(self._capacity, dtype=like.dtype, device=like.device)
        return self._slots[key][: math.prod(shape)].view(*shape)


class _Entry:
    """A layer's graphs for one shape."""

    def __init__(self, layer: CapturedLayer, inputs: _Inputs, hidden: Tensor, needs_x: bool, shape: _Shape) -> None:
        self.layer, self.inputs, self.needs_x, self.shape = layer, inputs, needs_x, shape
        self.autocast = _autocast(hidden.device.type)
        size = [*hidden.shape[:-2], inputs.num_positions, hidden.shape[-1]]
        stack, index = layer.stack, layer.index
        self.x = stack.slot("x", index, hidden, size)
        self.used, like = self._try()
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
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor, entry: _Entry, running: _Pass) -> Tensor:
        assert entry.forward is not None
        entry.forward.replay()
        ctx.entry, ctx.running, ctx.num_positions = entry, running, hidden.shape[-2]
        return _alias(entry.y, hidden.shape[-2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        entry: _Entry = ctx.entry
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
        self.num_weights = sum(
            getattr(module, "in_features", 0) * getattr(module, "out_features", 0) for module in layer.modules()
        )
        self._names = list(inspect.signature(type(layer).forward).parameters)[1:]
        self._num_segments = self._longest = 1
        self._running: weakref.ref[_Pass] | None = None
        self.buffers: list[Tensor] = []

    @property
    def in_flight(self) -> bool:
        """Whether the way back of its last pass is still to come."""
        return _in_flight(self._running)

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
        running = _Pass()
        self._running = weakref.ref(running)
        entry.inputs.used_by(running)
        return _Replay.apply(hidden, _anchor(), entry, running)

    def _ready(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[_Entry, Tensor] | str:
        """The graph of these inputs with the inputs in place; else why there is none."""
        call = _read(self._names, args, kwargs)
        if isinstance(call, str):
            return f"input {call}"
        hidden, stack = call.hidden, self.stack
        needs_x = hidden.requires_grad
        if not (needs_x or self.parameters):
            return "frozen"
        if 4.0 * self.num_weights * hidden.numel() / hidden.shape[-1] > stack.limit:
            return "large"
        sizes = self._sizes(call)
        width = hidden.numel() // hidden.shape[-2]
        kind = needs_x, hidden.dtype, tuple(hidden.shape[:-2]), _autocast_key(hidden.device.type)
        key = (*sizes, *kind, call.constants)
        reason = stack.enter(self.index, key, sizes[0], width)
        if reason is not None:
            return reason
        assert stack.active is not None
        known = stack.active.entries.get(self.index)
        if known is not None and known[0] == key and not stack.active.capturing:
            entry = known[1]
            if not entry.inputs.fill(call):
                return "called twice"
            _put(entry.x, hidden.detach())
            return entry, hidden
        if not stack.active.capturing:
            stack.forget()
            return "new shape"
        if not stack.fits(sizes[0] * width):
            return "wider than the first layer"
        return self._capture(key, call, sizes, needs_x)

    def _sizes(self, call: _Call) -> tuple[int, int, int]:
        """Positions, segments and length of the longest that a graph is made for; the latter two never get smaller."""
        num_positions = call.hidden.shape[-2]
        if call.ends is None:
            return num_positions, 0, 0
        padded = rounded(num_positions)
        self._longest = max(self._longest, _power_of_two(call.longest))
        # The padding's segments are not longer than the others.
        needed = len(call.ends) - 1 + -(-(padded - num_positions) // self._longest)
        self._num_segments = max(self._num_segments, _power_of_two(needed))
        return padded, self._num_segments, self._longest

    def _capture(
        self, key: Any, call: _Call, sizes: tuple[int, int, int], needs_x: bool
    ) -> tuple[_Entry, Tensor] | str:
        stack, hidden = self.stack, call.hidden
        assert stack.active is not None
        try:
            inputs = stack.active.inputs(call, sizes)
            if not inputs.fill(call):
                return "called twice"
            _put(stack.slot("x", self.index, hidden, [*hidden.shape[:-2], sizes[0], hidden.shape[-1]]), hidden.detach())
            entry = _Entry(self, inputs, hidden, needs_x, stack.active)
            graph = stack.graph(stack)
            graph.capture(entry.run_forward)
        except RuntimeError as error:
            self._give_up(error)
            return "error"
        entry.forward = graph
        stack.active.entries[self.index] = key, entry
        return entry, hidden

    def accumulate(self, entry: _Entry) -> None:
        """The way back, into the parameters' gradients."""
        parameters = [(self.parameters[number], number) for number in entry.used]
        if not self.buffers:
            self._make_buffers()
        ours = all(parameter.grad is self.buffers[number] for parameter, number in parameters)
        if self.buffers and not ours:
            torch._foreach_zero_(self.buffers)
        if entry.backward is None and entry.shape.capturing:
            graph = self.stack.graph(self.stack)
            try:
                graph.capture(entry.run_backward)
                entry.backward = graph
            except RuntimeError as error:
                self._give_up(error)
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
        given = self.stack.gradients
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


def graph_stacks(
    model: Any, plan: ActivationPlan, *, most_patches: int = 0, most_tokens: int = 0
) -> tuple[Stack, Stack] | None:
    """Stacks for the layers of vision tower and language model.

    Args:
        model: The model that learns, with its adapter.
        plan: What becomes of activations.
        most_patches: Of the largest micro-batch, as far as known.
        most_tokens: Likewise.

    Returns:
        None where graphs do not help or would change the result: on a CPU; with inputs in host memory, which is for steps
        that take long anyway; with dropout, whose random numbers a recomputed layer must draw again; and with several
        processes, which exchange gradients as they come.
    """
    drops = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not next(model.parameters()).is_cuda or plan.offload or drops or several:
        return None
    limit = LAUNCH_BOUND_OPERATIONS
    return Stack(limit=limit, most_positions=most_patches), Stack(limit=limit, most_positions=most_tokens)
