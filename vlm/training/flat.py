"""Trained parameters as slices of a few long tensors, so that the optimiser takes one step and not hundreds.

An adapter has some 650 small matrices. bitsandbytes' AdamW calls a kernel for each and waits for the GPU after each: 50 ms
a step at 2B, half of what a packed step takes. AdamW is elementwise, so over one long tensor it computes the same; each
slice starts at a multiple of the 8-bit state's blocks, which so never mix two matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Values of one block of bitsandbytes' 8-bit states.
_BLOCK = 256
# In an optimiser's group, and so in its checkpoints: which parameters ever had a gradient.
SEEN = "had_gradient"


def scale_down(gradients: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales gradients in place so that their norm is no more than the largest, as `torch.nn.utils.clip_grads_with_norm_` does.

    Args:
        gradients: All of them, or a process's part.
        norm: Over all, a scalar.
        max_norm: The largest; infinite for any.
    """
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.dtype))


class FlatParameters:
    """Makes an optimiser work on one long tensor per group.

    Gradients are added up where the optimiser reads them; so there is one copy of them, and none is made.

    A parameter without a gradient in a step counts as one whose gradient is zero: its moments decay meanwhile.

    Args:
        optimizer: Without state yet; its groups are changed in place.

    Attributes:
        gradients: The place of each parameter's gradient.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients: dict[Tensor, Tensor] = {}
        self._gradients: list[Tensor] = []
        assert not optimizer.state, "parameters become slices before the first step"
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self._parameters: list[list[Tensor]] = [list(group["params"]) for group in optimizer.param_groups]
        for group, parameters in zip(optimizer.param_groups, self._parameters, strict=True):
            group["params"] = [self._flatten(parameters)]
            group[SEEN] = [False] * len(parameters)
        self._optimizer = optimizer
        self._seen: set[Tensor] = set()
        self._hooks = {
            parameter: parameter.register_post_accumulate_grad_hook(lambda own: self.mark([own]))
            for parameter in self.gradients
        }
        optimizer.register_step_pre_hook(self._take)

    def begin(self) -> None:
        """Puts gradients, all zero, to their places. To be called when a step begins."""
        for whole in self._gradients:
            whole.zero_()
        for parameter, place in self.gradients.items():
            parameter.grad = place

    def mark(self, parameters: Iterable[Tensor]) -> None:
        """Notes that parameters have a gradient.

        Args:
            parameters: Some that an optimiser's group held.
        """
        for parameter in parameters:
            self._seen.add(parameter)
            hook = self._hooks.pop(parameter, None)
            if hook is not None:
                hook.remove()

    @property
    def wholes(self) -> list[Tensor]:
        """The long tensors of all gradients, one per group."""
        return self._gradients

    def clip(self, max_norm: float) -> Tensor:
        """Scales gradients down to a norm over all of them.

        Args:
            max_norm: The norm; infinite for none.

        Returns:
            The norm before, a scalar.
        """
        norm = torch.nn.utils.get_total_norm(self._gradients)
        scale_down(self._gradients, norm, max_norm)
        return norm

    def merge(self, add: Callable[[Sequence[float]], Sequence[float]]) -> None:
        """Notes the parameters that have a gradient in some other process.

        Args:
            add: Sums numbers over all processes.
        """
        own = list(self.gradients)
        counts = add([float(parameter in self._seen) for parameter in own])
        self.mark(parameter for parameter, count in zip(own, counts, strict=True) if count)
        for group, parameters in zip(self._optimizer.param_groups, self._parameters, strict=True):
            group[SEEN] = [had or own in self._seen for had, own in zip(group[SEEN], parameters, strict=True)]

    def _flatten(self, parameters: Sequence[Any]) -> torch.nn.Parameter:
        first = parameters[0]
        starts, end = [], 0
        for parameter in parameters:
            assert (parameter.dtype, parameter.device) == (first.dtype, first.device)
            starts.append(end)
            end += -(-parameter.numel() // _BLOCK) * _BLOCK
        flat = torch.nn.Parameter(torch.zeros(end, dtype=first.dtype, device=first.device))
        whole = torch.zeros_like(flat.data)
        self._gradients.append(whole)
        for parameter, start in zip(parameters, starts, strict=True):
            part = slice(start, start + parameter.numel())
            flat.data[part].copy_(parameter.data.flatten())
            parameter.data = flat.data[part].view(parameter.shape)
            self.gradients[parameter] = whole[part].view(parameter.shape)
        return flat

    def _take(self, *_: Any) -> None:
        """Hands the gradients to the optimiser, whoever took them away since the last step."""
        # Loading a checkpoint replaces the groups.
        for group, parameters, whole in zip(
            self._optimizer.param_groups, self._parameters, self._gradients, strict=True
        ):
            group["params"][0].grad = whole
            group[SEEN] = [had or own in self._seen for had, own in zip(group[SEEN], parameters, strict=True)]
            moved = [own for own in parameters if own.grad is not None and own.grad is not self.gradients[own]]
            assert not moved, "a step begins with `begin`"

    def without_gradient(self, names: Mapping[str, Tensor]) -> list[str]:
        """Names of parameters that never had a gradient.

        Args:
            names: All trained parameters by name.
        """
        seen = {
            parameter
            for group, parameters in zip(self._optimizer.param_groups, self._parameters, strict=True)
            for had, parameter in zip(group[SEEN], parameters, strict=True)
            if had
        }
        return [name for name, parameter in names.items() if parameter not in seen]
