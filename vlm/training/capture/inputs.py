"""What a layer is called with, sorted for a CUDA graph, and copies of it at fixed addresses."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm.packing.attention import Segments

_BOUNDARIES = ("cu_seq_lens_", "max_length_")
_ALONG_TOKENS = {"position_embeddings": -2, "position_ids": -1}


class NoGraphError(Exception):
    """Why a call runs without a graph; its text is counted and shown."""


class Pass:
    """One way of a layer forward, until its way back is done."""

    done = False


def in_flight(reference: weakref.ref[Pass] | None) -> bool:
    """Whether a pass is under way: it can still go back, and has not.

    Args:
        reference: To the pass; None for none.
    """
    running = None if reference is None else reference()
    return running is not None and not running.done


@dataclass(frozen=True)
class Call:
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
        """The tensors whose values are copied once for all layers that are given them."""
        own = [tensor for tensor, _ in self.along.values()]
        return (*own, self.ends) if self.ends is not None else tuple(own)


def read(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
    """Sorts a layer's inputs.

    Args:
        names: Of the positional parameters of its ``forward``.
        args: What it is called with.
        kwargs: Likewise, by name.

    Raises:
        NoGraphError: There is one that a graph could not be given.
    """
    values = dict(zip(names, args, strict=False)) | kwargs
    if any(isinstance(value, Segments) for value in values.values()):
        # Who gives segments gives them instead of these.
        values = {name: value for name, value in values.items() if not name.startswith(_BOUNDARIES)}
    hidden = values.pop("hidden_states", None)
    if not isinstance(hidden, Tensor) or hidden.ndim not in (2, 3):
        raise NoGraphError("input hidden_states")
    along: dict[str, tuple[Tensor, int]] = {}
    constants: list[tuple[str, Any]] = []
    ends, ends_name, lengths, longest = None, "", None, 0
    for name, value in values.items():
        if isinstance(value, Segments):
            if value.queries is not None or value.keys is not None or value.ends_k is not None:
                raise NoGraphError(f"input {name}")
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
                raise NoGraphError(f"input {name}")
        elif value is None or isinstance(value, bool | int | float | str):
            constants.append((name, value))
        else:
            raise NoGraphError(f"input {name}")
    num_tokens = hidden.shape[-2]
    if any(tensor.requires_grad or tensor.shape[where] != num_tokens for tensor, where in along.values()):
        raise NoGraphError("input positions")
    if ends is not None and hidden.numel() != num_tokens * hidden.shape[-1]:
        raise NoGraphError("input a batch of packed rows")
    return Call(hidden, tuple(constants), along, ends, ends_name, lengths, longest)


def power_of_two(number: int) -> int:
    """The next power of two.

    Args:
        number: At least 1.
    """
    return 1 << max(0, number - 1).bit_length()


class Inputs:
    """Copies, at fixed addresses, of what all layers of a kind are given."""

    def __init__(self, call: Call, num_positions: int, num_segments: int, longest: int) -> None:
        self.num_positions, self.longest = num_positions, longest
        self._sources: tuple[Tensor, ...] = ()
        self._users: list[weakref.ref[Pass]] = []
        self._along = {name: _padded(tensor, where, num_positions) for name, (tensor, where) in call.along.items()}
        self._ends: Tensor | None = None
        self._lengths: list[int] = []
        device = call.hidden.device
        self.values: dict[str, Any] = dict(call.constants)
        for name, _ in call.constants:
            if isinstance(self.values[name], tuple):  # the shape of a tensor without values
                self.values[name] = torch.empty(self.values[name], device=device)
        for name, tensor in self._along.items():
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
                self.values[call.ends_name] = Segments(
                    self._ends, self._lengths, causal=causal, kernel_only=call.hidden.is_cuda
                )

    def fill(self, call: Call) -> None:
        """Takes over a call's values.

        Raises:
            NoGraphError: The values before are still waited for.
        """
        if self.holds(call):
            return
        self._users = [user for user in self._users if in_flight(user)]
        if self._users:
            raise NoGraphError("called twice")
        num_positions = call.hidden.shape[-2]
        for name, (tensor, where) in call.along.items():
            self._along[name].narrow(where, 0, num_positions).copy_(tensor)
        if call.ends is not None:
            assert self._ends is not None
            filled = len(call.ends)
            self._ends[:filled].copy_(call.ends)
            torch.add(self._steps[: len(self._ends) - filled], num_positions, out=self._ends[filled:])
            self._ends[filled:].clamp_(max=self.num_positions)
            if self._lengths and not call.hidden.is_cuda:
                # Without the kernel, segments are cut by their lengths.
                self._lengths[:] = [length for length in self._ends.diff().tolist() if length]
        self._sources = call.sources

    def used_by(self, running: Pass) -> None:
        """Keeps the values until a pass is over."""
        self._users.append(weakref.ref(running))

    def holds(self, call: Call) -> bool:
        """Whether the values are this call's."""
        sources = call.sources
        return len(sources) == len(self._sources) and all(map(operator.is_, sources, self._sources))


def _padded(tensor: Tensor, where: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[where] = size
    return tensor.new_zeros(shape)
