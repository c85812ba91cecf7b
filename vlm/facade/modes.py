"""Switching a model between training and inference. Loads nothing itself."""

from __future__ import annotations

from typing import Any

from vlm.facade.state import FacadeState


def switch_to_training(model: Any, state: FacadeState) -> Any:
    """Training mode, with activations recomputed if the state says so.

    Args:
        model: With or without adapter.
        state: Of the model.
    """
    model.train()
    base = state.loaded.model
    enable, disable = _checkpointing_methods(base)
    if state.gradient_checkpointing:
        enable()
    else:
        disable()
    return model


def switch_to_inference(model: Any, state: FacadeState) -> Any:
    """Evaluation mode without recomputation, with the cache.

    Args:
        model: With or without adapter.
        state: Of the model.
    """
    model.eval()
    base = state.loaded.model
    _checkpointing_methods(base)[1]()
    # Trainers that recompute activations switch the cache off in the configuration, and leave it so.
    for config in (base.config, base.config.get_text_config(), base.generation_config):
        if getattr(config, "use_cache", None) is False:
            config.use_cache = True
    return model


def _checkpointing_methods(base: Any) -> tuple[Any, Any]:
    from functools import partial

    # transformers renamed this after 5.17.
    word = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    # Non-reentrant recomputation needs no input with a gradient, so that a frozen vision tower stays out of the graph.
    settings = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}

    def enable() -> None:
        getattr(base, f"{word}_checkpointing_enable")(**settings)
        base.disable_input_require_grads()

    return enable, partial(getattr(base, f"{word}_checkpointing_disable"))
