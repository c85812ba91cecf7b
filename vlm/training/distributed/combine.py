"""The end of a step on several processes: gradients and figures become those of all. Loads torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm.training.distributed.ranks import Ranks, is_spread


def combine_step(ranks: Ranks, model: Any, figures: Tensor, flat_gradients: Sequence[Tensor] | None) -> None:
    """Sums gradients and figures over all processes, and learns whether any was asked to stop.

    Gradients of what is spread have been summed in the backward pass.

    Args:
        ranks: This process among the others.
        model: Its gradients become sums; a parameter for which no process has one stays without, so that the optimiser passes
            it by as it does on one process.
        figures: One tensor that is summed along, in place.
        flat_gradients: Long tensors that hold all gradients, where they lie in such; there is one for every parameter then.
    """
    asked = float(ranks.stop.asked is not None)
    if flat_gradients is not None:
        num_asked, *_ = ranks.agree([asked])
        gradients = list(flat_gradients)
    else:
        learning = [own for own in model.parameters() if own.requires_grad and not is_spread(own)]
        num_asked, *having = ranks.agree([asked, *(float(own.grad is not None) for own in learning)])
        gradients = []
        for parameter, count in zip(learning, having, strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
    ranks.stop.agree(num_asked)
    ranks.add([figures, *gradients])
