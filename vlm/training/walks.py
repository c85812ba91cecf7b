"""Fewer walks over all modules of a model that learns. Loads torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def short_walks(model: Any) -> Iterator[None]:
    """Has ``train()`` and ``zero_grad()`` of a model do only what is left to do, within a block.

    The stock trainer calls both in every step, and each walks over all modules: thousands in a model with adapters, which
    is a tenth of the host's time in the steps of a small one. Here all modules are in one mode, and what does not learn has
    no gradient.

    Args:
        model: With its adapter, or that is trained whole; what learns stays the same meanwhile.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stock = model.train

    def train(mode: bool = True) -> Any:
        return model if mode and model.training else stock(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        assert set_to_none, "gradients are made anew in every step"
        for parameter in learning:
            parameter.grad = None

    model.train, model.zero_grad = train, zero_grad
    try:
        yield
    finally:
        del model.train, model.zero_grad
