"""Which layers keep their activations for the backward pass, and which make them again.

Recomputing a layer costs its forward pass once more; for an adapter over a frozen model, whose backward pass has no
gradients of weights, that is half as much again. So as few layers as possible are recomputed. Those at a tower's start
are, because the layers after them have been freed by the time that they run again. Towers go in turn: a layer of the
vision tower, being narrower, gives back more bytes per operation. What is left of a recomputed layer, its input, can wait
in the host's memory.

Before any of this, where not everything fits, a frozen input embedding that is not the head's, too, moves to the host's
memory (`vlm.kernels.host_embedding`): reading its rows there costs less than recomputing a single layer.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

ActivationMode = Literal["auto", "keep", "recompute", "offload"]
# A layer that computes for 5 ms, both ways, is longer at work than its launches take.
LAUNCH_BOUND_OPERATIONS = 4e12
# Of the device's memory: the allocator cannot use all of it, and estimates err.
_USABLE_SHARE = 0.9


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
) -> ActivationPlan:
    """Settles the plan of a training.

    Args:
        mode: As configured.
        num_vision_layers: Trained layers of the vision tower; 0 for a frozen one, which keeps nothing.
        num_language_layers: Layers of the language model.
        expected_bytes: Memory of the costliest step under a plan.
        device_memory_bytes: What there is; None on a CPU, where ``auto`` recomputes everything.
        embedding_can_move: Whether the input embedding is frozen and not the head's, too.

    Returns:
        For ``auto``, the fewest recomputed layers with which the step fits; everything recomputed and offloaded where
        nothing fits. The embedding goes to the host with ``offload``, and with ``auto`` where not all fits as it is.
    """
    if mode == "keep":
        return ActivationPlan(0, 0)
    all_vision = None if num_vision_layers else 0
    everything = ActivationPlan(all_vision, None)
    host = embedding_can_move
    offloaded = ActivationPlan(all_vision, None, offload=True, embedding_on_host=host)
    if mode == "offload":
        return offloaded
    if mode == "recompute" or device_memory_bytes is None:
        return everything
    budget = int(_USABLE_SHARE * device_memory_bytes)
    candidates = [ActivationPlan(number, 0, embedding_on_host=host) for number in range(num_vision_layers)]
    candidates += [ActivationPlan(all_vision, number, embedding_on_host=host) for number in range(num_language_layers)]
    candidates += [replace(everything, embedding_on_host=host), offloaded]
    # A single recomputed layer saves nothing, since it is whole again while it runs backward: memory falls from there on.
    for part in ([ActivationPlan(0, 0)], candidates[:1], candidates[1:]):
        found = bisect.bisect_left(part, True, key=lambda plan: expected_bytes(plan) <= budget)
        if found < len(part):
            return part[found]
    return offloaded
