"""The loss of a training step: cross-entropy summed over labelled positions, through `vlm.kernels.head_loss`.

Only labelled positions reach the head, whatever the head is (frozen, trained whole, adapted), on every device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from vlm.kernels.head_loss import head_loss
from vlm.training.collator import IGNORED


@dataclass
class SupervisedLoss(ModelOutput):
    """What a model gives in training.

    Attributes:
        total: Cross-entropy summed over labelled positions, a scalar in float32.
        num_right: Positions whose likeliest word was the right one, a scalar.
        num_supervised: Labelled positions, a scalar.
    """

    total: Tensor | None = None
    num_right: Tensor | None = None
    num_supervised: Tensor | None = None


def add_supervised_loss(model: Any) -> None:
    """Lets a model be called with ``supervised=True`` and labels, to give a `SupervisedLoss` and no logits.

    The call goes through the model's own ``forward``, so that wrappers around the model (of an adapter, of several
    processes) see it. Other calls are as before.

    Args:
        model: A transformers model with a head, changed in place.
    """
    stock = model.forward

    # `generate` and peft look at the signature.
    @functools.wraps(stock)
    def forward(*args: Any, supervised: bool = False, **kwargs: Any) -> Any:
        if not supervised:
            return stock(*args, **kwargs)
        labels = kwargs.pop("labels")
        # A cache would be filled for nothing, and twice by recomputed layers.
        hidden = model.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        # Each position answers for the word after it.
        labelled = (labels[:, 1:] != IGNORED).flatten().nonzero().squeeze(1)
        targets = labels[:, 1:].flatten()[labelled]
        rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        total, num_right = head_loss(rows.index_select(0, labelled), active_head(model), targets)
        return SupervisedLoss(total, num_right, torch.tensor(len(labelled), device=total.device))

    model.forward = forward


def active_head(model: Any) -> Any:
    """The language-model head that is in use; where it is trained whole, the copy that learns.

    Args:
        model: A transformers model, perhaps with an adapter on it.
    """
    from peft.utils.other import ModulesToSaveWrapper

    head = model.get_output_embeddings()
    if not isinstance(head, ModulesToSaveWrapper):
        return head
    if head.disable_adapters:
        return head.original_module
    return head.modules_to_save[head.active_adapters[0]]
