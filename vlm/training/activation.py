"""Which layers keep their activations for the backward pass, and which make them again.

Recomputing a layer costs its forward pass once more; for an adapter over a frozen model, whose backward pass has no
gradients of weights, that is half as much again. So as few layers as possible are recomputed. Those at a tower's start
are, because the layers after them have been freed by the time that they run again. Towers go in turn: a layer of the
vision tower, being narrower, gives back more bytes per operation. What is left of a recomputed layer, its input, can wait
in the host's memory.

CUDA graphs, which are what makes small steps fast, want memory of their own (`vlm.training.memory`). Where the host is what a
step waits for, they come before kept activations: recomputing a layer costs a launch. Where it is not, they get what is left.
Where there is no room for them, they are not tried.

Before any of this, where not everything fits, a frozen input embedding that is not the head's, too, moves to the host's
memory (`vlm.kernels.host_embedding`): reading its rows there costs less than recomputing a single layer.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

ActivationMode = Literal["auto", "keep", "recompute", "offload"]
# A layer that computes for 5 ms, both ways, is longer at work than its launches take.
LAUNCH_BOUND_OPERATIONS = 4e12
# Of the device's memory: the allocator cannot use all of it, and estimates err.
USABLE_SHARE = 0.9
# On a CPU a step that needs no more than this keeps its activations: memory is no worry then.
_CPU_BYTES = 2 << 30


@dataclass(frozen=True)
class ActivationPlan:
    """What happens to activations in a training step."""

    recomputed_vision: int | None
    """Layers at the start of the vision tower that are recomputed; None for all of them."""
    recomputed_language: int | None
    """Layers at the start of the language model that are recomputed; None for all of them."""
    offload: bool = False
    """Whether inputs of recomputed layers wait in the host's memory."""
    embedding_on_host: bool = False
    """Whether the input embedding lies in the host's memory."""
    cuda_graphs: bool = False
    """Whether layers of steps that are too small to keep a GPU busy are replayed as CUDA graphs."""

    @property
    def recomputes_all(self) -> bool:
        """Whether no layer keeps its activations."""
        return self.recomputed_vision is None and self.recomputed_language is None


def rounded(number: int) -> int:
    """The number of positions that a CUDA graph is made for: up by an eighth at most, in steps of 64 at least.

    Args:
        number: Of positions.
    """
    step = max(64, 1 << max(0, number.bit_length() - 4))
    return -(-number // step) * step


def choose_activations(
    mode: ActivationMode,
    *,
    num_vision_layers: int,
    num_language_layers: int,
    expected_bytes: Callable[[ActivationPlan], int],
    device_memory_bytes: int | None,
    embedding_can_move: bool = False,
    graphs: bool = False,
    launch_bound: bool = False,
) -> ActivationPlan:
    """Settles the plan of a training.

    Args:
        mode: As configured.
        num_vision_layers: Trained layers of the vision tower; 0 for a frozen one, which keeps nothing.
        num_language_layers: Layers of the language model.
        expected_bytes: Memory of the costliest step under a plan, that of CUDA graphs included.
        device_memory_bytes: What there is; None on a CPU.
        embedding_can_move: Whether the input embedding is frozen and not the head's, too.
        graphs: Whether small steps may be replayed as CUDA graphs, if there is room.
        launch_bound: Whether the language model's part of the step takes as long as its launches.

    Returns:
        For ``auto`` on a CPU, all or nothing. On a GPU, the fewest recomputed layers with which the step fits, for a
        launch-bound one with graphs if it fits with them at all; everything recomputed and offloaded where nothing fits. The
        embedding goes to the host with ``offload``, and with ``auto`` where not all fits as it is.
    """
    all_vision = None if num_vision_layers else 0
    everything = ActivationPlan(all_vision, None)
    host = embedding_can_move
    offloaded = ActivationPlan(all_vision, None, offload=True, embedding_on_host=host)
    if mode == "offload":
        return offloaded
    budget = math.inf if device_memory_bytes is None else int(USABLE_SHARE * device_memory_bytes)

    def fits(plan: ActivationPlan) -> bool:
        return expected_bytes(plan) <= budget

    def with_graphs(plan: ActivationPlan) -> ActivationPlan:
        captured = replace(plan, cuda_graphs=True)
        return captured if graphs and fits(captured) else plan

    keeps = mode == "keep"
    if mode == "auto" and device_memory_bytes is None:
        keeps = expected_bytes(ActivationPlan(0, 0)) <= _CPU_BYTES
    if mode != "auto" or device_memory_bytes is None:
        return with_graphs(ActivationPlan(0, 0) if keeps else everything)
    some = [ActivationPlan(number, 0, embedding_on_host=host) for number in range(num_vision_layers)]
    some += [ActivationPlan(all_vision, number, embedding_on_host=host) for number in range(num_language_layers)]
    some += [replace(everything, embedding_on_host=host)]
    for captured in (True, False) if graphs and launch_bound else (False,):
        candidates = [replace(plan, cuda_graphs=captured) for plan in some]
        # A single recomputed layer saves nothing, since it is whole again while it runs backward: memory falls from there on.
        for part in ([ActivationPlan(0, 0, cuda_graphs=captured)], candidates[:1], candidates[1:]):
            found = bisect.bisect_left(part, True, key=fits)
            if found < len(part):
                return with_graphs(part[found])
    return offloaded
