"""Putting a saved adapter on a loaded base model. Loads torch and peft."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlm.errors import LoraError
from vlm.lora.full import attach_full, detach_full, full_parts
from vlm.lora.peft_model import (
    TARGETS_FILE,
    WEIGHTS_FILE,
    WHOLE_ATTRIBUTE,
    adapter_parameters,
    load_tensors,
    read_config,
    run_whole_modules_in_own_precision,
    unwrap,
    wrap,
)

if TYPE_CHECKING:
    from peft import PeftModel

    from vlm.loading.checkpoint import LoadedModel


def attach_adapter(loaded: LoadedModel, adapter_dir: Path, *, trainable: bool) -> PeftModel:
    """Puts a saved adapter on the base model, which is changed in place; ``detach_adapter`` undoes that.

    Args:
        loaded: The base model, without adapter.
        adapter_dir: Folder of an adapter.
        trainable: Whether the adapter's parameters learn; they are then float32.

    Returns:
        The adapted model, in evaluation mode; the base model itself where its own weights are trained.

    Raises:
        LoraError: The adapter was made for another base, or does not fit exactly.
    """
    recorded = None
    if (adapter_dir / TARGETS_FILE).is_file():
        recorded = json.loads((adapter_dir / TARGETS_FILE).read_text(encoding="utf-8"))["base_digest"]
    if recorded is not None and loaded.digest is not None and recorded != loaded.digest:
        raise LoraError(
            f"the adapter was made for base checkpoint {recorded[:12]} but this is {loaded.digest[:12]};"
            " load the base that it was made for, or make a new adapter"
        )
    if full_parts(adapter_dir):
        return attach_full(loaded, adapter_dir, trainable=trainable)
    config = read_config(adapter_dir)
    config.inference_mode = not trainable
    names = [name for name, _ in loaded.model.named_modules()]
    names += [name for name, _ in loaded.model.named_parameters()]
    targets = [] if isinstance(config.target_modules, str) else sorted(config.target_modules or [])
    targets += config.target_parameters or []
    # Adapters made elsewhere often give endings instead of full names.
    absent = [
        target
        for target in [*targets, *(config.modules_to_save or [])]
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]
    if absent:
        raise LoraError(
            f"the adapter has {absent[0]!r} among its modules ({len(absent)} such), which the base model does not have;"
            " load the base that it was made for"
        )
    peft_model = wrap(loaded.model, config)
    try:
        if trainable:
            # peft makes LoRA matrices float32 but leaves whole modules in the base's precision, where small updates
            # would be rounded away.
            for parameter in adapter_parameters(peft_model).values():
                parameter.data = parameter.data.to(torch.float32)
                parameter.requires_grad_(True)
            run_whole_modules_in_own_precision(peft_model, getattr(torch, loaded.dtype))
        load_tensors(peft_model, adapter_dir / WEIGHTS_FILE)
    except BaseException:
        unwrap(peft_model)
        raise
    return peft_model.eval()


def detach_adapter(peft_model: PeftModel) -> None:
    """Takes the adapter off; the base model is as before.

    Args:
        peft_model: What ``attach_adapter`` gave.
    """
    if hasattr(peft_model, WHOLE_ATTRIBUTE):
        detach_full(peft_model)
    else:
        unwrap(peft_model)


@contextmanager
def attached(loaded: LoadedModel, adapter_dir: Path | None, *, trainable: bool = False) -> Iterator[torch.nn.Module]:
    """The model with an adapter for the length of a block, or the bare base model for ``None``.

    Args:
        loaded: The base model.
        adapter_dir: Folder of an adapter, or None.
        trainable: As in ``attach_adapter``.

    Yields:
        The model to call.
    """
    if adapter_dir is None:
        yield loaded.model.eval()
        return
    peft_model = attach_adapter(loaded, adapter_dir, trainable=trainable)
    try:
        yield peft_model
    finally:
        detach_adapter(peft_model)
