"""What the layers of a tower share: graphs by shape, slots, and the memory of graphs."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm.training.activation import rounded
from vlm.training.capture.inputs import Call, Inputs, NoGraphError

if TYPE_CHECKING:
    from vlm.training.capture.entry import Entry
    from vlm.training.capture.layer import CapturedLayer
    from vlm.training.flat import FlatParameters

# Shapes of a stack that are kept as graphs; each costs some megabytes of launches per layer.
_MOST_SHAPES = 24
# A shape serves rows of half its size, too, until a size has come so often that it gets its own.
MOST_WASTE, _OFTEN = 2, 3


def make_room() -> None:
    """Gives back memory that the allocator keeps for later, if there is little else: while recording it cannot.

    Asked before each graph and not once for all of a pass: each takes more of what is left, and the layers that are tried
    in between leave more that is kept.
    """
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()
    if min(free, share * total - reserved) < reserved - torch.cuda.memory_allocated():
        torch.cuda.empty_cache()


def _free_random_numbers() -> None:
    """Lets random numbers be drawn again after a graph that could not be ended: PyTorch takes its generator to be in use still."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


class Graph:
    """One CUDA graph."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._graph: Any = None

    def capture(self, function: Callable[[], None]) -> None:
        """Records what a function launches, without running it."""
        stack, current = self._stack, torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        make_room()
        stack.stream.wait_stream(current)
        # Whatever of an earlier graph is collected while this one is recorded would spoil it.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(stack.stream):
                # Other threads (of a data loader, say) go on meanwhile.
                graph.capture_begin(pool=stack.memory.pool, capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
        except RuntimeError:
            _free_random_numbers()
            raise
        finally:
            if collects:
                gc.enable()
        current.wait_stream(stack.stream)
        self._graph = graph

    def replay(self) -> None:
        """Launches it on the current stream."""
        self._graph.replay()


class Memory:
    """The memory that graphs work in.

    What one graph frees the next may use, since they run one after the other. Where nothing in it outlives a graph, that
    is, where all layers are recomputed, several stacks can share it.
    """

    def __init__(self) -> None:
        self.stacks: list[Stack] = []
        self._pool: Any = None

    @property
    def pool(self) -> Any:
        """Its handle."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def renew(self) -> None:
        """Takes another where no graph is left: the memory goes with the last one."""
        if not any(stack.has_graphs for stack in self.stacks):
            self._pool = None


class Shape:
    """The graphs of one shape: what one pass through the stack captured, all of it or nothing.

    What a layer keeps for its way back lies in the graphs' common memory, where only the order of one whole pass says who
    may use which part when. So a layer is never captured into the graphs of an earlier pass.
    """

    def __init__(self, num_positions: int) -> None:
        self.num_positions = num_positions
        self.entries: dict[int, Entry] = {}
        self.capturing = True
        self._inputs: dict[Any, list[Inputs]] = {}

    def inputs(self, call: Call, sizes: tuple[int, int, int]) -> Inputs:
        """The copies that hold this call's values, or new ones."""
        key = sizes, call.constants, tuple((name, own.shape[:-2]) for name, (own, _) in call.along.items())
        known = self._inputs.setdefault(key, [])
        for inputs in known:
            if inputs.holds(call):
                return inputs
        known.append(Inputs(call, *sizes))
        return known[-1]

    @property
    def complete(self) -> bool:
        """Whether all layers went back, too."""
        return all(entry.backward is not None for entry in self.entries.values())


class Stack:
    """What the layers of a tower share.

    Args:
        graph: Makes a graph.
        memory: What graphs work in.
        limit: Operations of a layer, both ways, above which it is not captured: there the host is ahead anyway.
        most_positions: Positions of the largest row to come, as far as known: a larger one throws away all graphs.

    Attributes:
        companions: Stacks of the same model, which give up with this one where memory is what there is too little of.
        flat: Gives parameters' gradients their places, if they have any.
        num_replays: Calls that were replayed.
        reasons: Why the others ran without a graph, and how many.
    """

    def __init__(
        self,
        graph: type[Graph] = Graph,
        *,
        memory: Memory | None = None,
        limit: float = float("inf"),
        most_positions: int = 0,
    ) -> None:
        self.graph, self.limit, self.most_positions = graph, limit, most_positions
        self.memory = memory or Memory()
        self.memory.stacks.append(self)
        self.num_replays = 0
        self.flat: FlatParameters | None = None
        self.reasons: Counter[str] = Counter()
        self.layers: list[CapturedLayer] = []
        self.companions: list[Stack] = []
        self.disabled = False
        self.active: Shape | None = None
        self._position = -1
        self._seen: Counter[tuple[int, Any, int]] = Counter()
        self._shapes: dict[tuple[int, Any, int], Shape] = {}
        self._bounds: dict[tuple[int, Any], tuple[int, int]] = {}
        self._capacity = 0
        self._slots: dict[Any, Tensor] = {}
        self._stream: Any = None

    @property
    def has_graphs(self) -> bool:
        """Whether any shape was captured."""
        return bool(self._shapes)

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

    def enter(self, index: int, num_positions: int, bounds: tuple[int, int], kind: Any, width: int) -> Shape:
        """Says that a layer is called; the first of a pass settles which graphs the pass takes.

        Args:
            index: The layer's.
            num_positions: Positions of its padded input.
            bounds: Most segments and greatest length of one, which only ever grow.
            kind: What else makes its shape.
            width: Values of a position.

        Returns:
            The graphs of this pass.

        Raises:
            NoGraphError: It has none.
        """
        first, self._position = index <= self._position or self._position < 0, index
        if not first:
            if self.active is None:
                raise NoGraphError("pass without graphs")
            return self.active
        self.active = None
        if self.in_flight:
            raise NoGraphError("called twice")
        if self._bounds.get((index, kind)) != bounds:
            # All that was captured of this kind is too small.
            self._shapes = {key: shape for key, shape in self._shapes.items() if key[:2] != (index, kind)}
            self._bounds[index, kind] = bounds
        # Passes that were broken off.
        self._shapes = {key: shape for key, shape in self._shapes.items() if shape.complete}
        self._seen[index, kind, num_positions] += 1
        size = self._size(index, kind, num_positions, exact=bounds == (0, 0))
        if size is not None:
            self.active = self._shapes[index, kind, size]
            self.active.capturing = False
            return self.active
        if len(self._shapes) >= _MOST_SHAPES:
            raise NoGraphError("too many shapes")
        if num_positions * width > self._capacity:
            self.clear()
            self._capacity = max(num_positions, rounded(self.most_positions)) * width
        self.memory.renew()
        self.active = self._shapes[index, kind, num_positions] = Shape(num_positions)
        return self.active

    def _size(self, index: int, kind: Any, num_positions: int, *, exact: bool) -> int | None:
        """The captured size to take; None to capture another.

        Where the host is what one waits for, positions are cheap and captures dear. So a larger size will do until one has
        come a few times. Where there are no boundaries, nothing keeps padding apart, and only the size itself is right.
        """
        known = [size for *key, size in self._shapes if key == [index, kind]]
        if num_positions in known:
            return num_positions
        larger = [] if exact else [size for size in known if num_positions < size <= MOST_WASTE * num_positions]
        often = self._seen[index, kind, num_positions] >= _OFTEN and len(self._shapes) < _MOST_SHAPES
        return None if often else min(larger, default=None)

    def fits(self, num_values: int) -> bool:
        """Whether slots hold so many values."""
        return num_values <= self._capacity

    def forget(self) -> None:
        """Has the shape of this pass captured anew when it comes again."""
        self._shapes = {key: shape for key, shape in self._shapes.items() if shape is not self.active}
        self.active = None

    def give_up(self, *, companions: bool) -> None:
        """Says that there will be no more graphs; `release` gives back what those that are there took.

        Args:
            companions: Whether the model's other stacks give up, too.
        """
        for stack in (self, *(self.companions if companions else ())):
            stack.disabled = True

    def release(self) -> None:
        """Gives back what graphs took, here and in companions that gave up, as far as no way back is waiting for it.

        A layer that is recomputed goes back without a graph as well, from its input's slot. One that keeps its activations
        has them in the graphs' memory, and slots are read until a pass is over: so this is called again then.
        """
        assert self.disabled
        if torch.cuda.is_initialized():
            # A graph may still run. It happens once or twice.
            torch.cuda.synchronize()
        for stack in (self, *self.companions):
            if not stack.disabled:
                continue
            for shape in stack._shapes.values():
                for entry in shape.entries.values():
                    entry.drop()
            if not stack.in_flight:
                stack.clear()
                for layer in stack.layers:
                    layer.buffers = []
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    @property
    def in_flight(self) -> bool:
        """Whether a layer's way back is still to come."""
        return any(layer.in_flight for layer in self.layers)

    def clear(self) -> None:
        """Throws away all graphs."""
        self.active = None
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
