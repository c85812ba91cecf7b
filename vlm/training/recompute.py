"""Recomputing layers in the backward pass, as planned (`vlm.training.activation`). Loads torch."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.families import Family
from vlm.training.activation import ActivationPlan
from vlm.training.capture import CapturedLayer, Stack, capturable

# Smaller inputs, such as positions, are not worth a copy.
_OFFLOADED_VALUES = 2**14


@contextmanager
def recomputed(
    model: Any,
    family: Family,
    plan: ActivationPlan,
    *,
    min_offloaded: int = _OFFLOADED_VALUES,
    stacks: tuple[Stack, Stack] | None = None,
) -> Iterator[None]:
    """Recomputes the layers of a plan for the length of a block.

    Recomputation is non-reentrant, which needs no input with a gradient: a frozen vision tower stays out of the graph.

    Args:
        model: The base model.
        family: Its row of the table, which says what a layer is.
        plan: How many layers at the start of each tower, and whether their inputs go to the host's memory.
        min_offloaded: Inputs of fewer values stay on the device.
        stacks: Where layers of the vision tower and of the language model keep CUDA graphs; None for no graphs.
    """
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    if plan.offload:
        around = _HostMemory(min_offloaded).hooks
    with ExitStack() as stack:
        for own in stacks or ():
            # Memory of graphs serves nothing else while there is one.
            stack.callback(own.clear)
        for number, (pattern, count) in enumerate(
            ((family.vision_layer, plan.recomputed_vision), (family.language_layer, plan.recomputed_language))
        ):
            layers = [module for name, module in model.named_modules() if re.fullmatch(pattern, name)]
            for index, layer in enumerate(layers):
                stack.callback(_restore, layer, layer.__dict__.get("forward"))
                stock = layer.forward
                recompute = count is None or index < count
                if recompute:
                    layer.forward = partial(_forward, layer, stock, around)
                if stacks is not None and capturable(layer):
                    layer.forward = CapturedLayer(stacks[number], layer, stock, layer.forward, recompute)
        yield


def _restore(layer: Any, own: Any) -> None:
    layer.__dict__.pop("forward", None)
    if own is not None:
        layer.forward = own


def _forward(
    layer: torch.nn.Module,
    stock: Callable[..., Any],
    around: Callable[[], AbstractContextManager[Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return stock(*args, **kwargs)
    with around():
        # The positional arguments are kept as autograd keeps tensors, through the hooks around this call; what the
        # layer itself would keep is dropped.
        return checkpoint(stock, *args, use_reentrant=False, **kwargs)


class _Parked:
    """A tensor in the host's memory."""

    def __init__(self, host: Tensor, previous: _Parked | None) -> None:
        self.host = host
        self.back: Tensor | None = None
        self.previous = None if previous is None else weakref.ref(previous)


class _HostMemory:
    """Moves kept tensors to pinned host memory and back, on a stream of its own beside the computation."""

    def __init__(self, min_values: int) -> None:
        self._min_values = min_values
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._newest: _Parked | None = None

    def hooks(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | tuple[_Parked, torch.device]:
        if tensor.numel() < self._min_values or not tensor.is_floating_point():
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if tensor.is_cuda:
            stream = self._stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                host.copy_(tensor.detach(), non_blocking=True)
            # Its memory is not given to others before the copy is through.
            tensor.record_stream(stream)
        else:
            host.copy_(tensor.detach())
        # A reference to the one before, for fetching ahead; it must not keep that one alive.
        self._newest = _Parked(host, self._newest)
        return self._newest, tensor.device

    def _unpack(self, packed: Tensor | tuple[_Parked, torch.device]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        parked, device = packed
        self._fetch(parked, device)
        tensor = parked.back
        assert tensor is not None
        parked.back = None
        if device.type == "cuda":
            torch.cuda.current_stream(device).wait_stream(self._stream(device))
            tensor.record_stream(torch.cuda.current_stream(device))
        # Layers run backward in turn: the next one's input comes while this one computes.
        before = parked.previous() if parked.previous is not None else None
        if before is not None and device.type == "cuda":
            self._fetch(before, device)
        return tensor

    def _fetch(self, parked: _Parked, device: torch.device) -> None:
        if parked.back is not None:
            return
        if device.type == "cuda":
            with torch.cuda.stream(self._stream(device)):
                parked.back = parked.host.to(device, non_blocking=True)
        else:
            parked.back = parked.host.clone()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
