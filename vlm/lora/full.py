"""Full fine-tuning: whole parts of the model learn, without an adapter.

It keeps an adapter's shape wherever steps hand it on. The initial artifact is ``targets.json`` alone, since the weights
are the base model's; the trained one has the weights beside it, float32, under their full names. Loads torch.

While they are trained, weights are float32, whatever the base is stored in: in 16 bit, small updates would be rounded
away. Otherwise they are used in the base's own precision, as an export has them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm.config import LoraConfig
from vlm.config.model import Part
from vlm.errors import LoraError
from vlm.lora.peft_model import TARGETS_FILE, WEIGHTS_FILE, WHOLE_ATTRIBUTE, load_tensors

if TYPE_CHECKING:
    from vlm.families import Family
    from vlm.loading.checkpoint import LoadedModel

_ALL_PARTS = {"vision", "projector", "language"}


@dataclass(frozen=True)
class _Before:
    """A parameter as it was."""

    data: torch.Tensor
    requires_grad: bool


def full_parts(adapter_dir: Path) -> tuple[Part, ...]:
    """The parts that an artifact trains whole; () for an adapter.

    Args:
        adapter_dir: Folder of an adapter, perhaps made elsewhere.
    """
    path = adapter_dir / TARGETS_FILE
    if not path.is_file():
        return ()
    return tuple(json.loads(path.read_text(encoding="utf-8")).get("full_finetuning", ()))


def trained_whole(model: torch.nn.Module, family: Family, parts: Iterable[str]) -> dict[str, torch.nn.Parameter]:
    """The parameters of some parts, each once, also where weights are tied.

    Args:
        model: Without adapter.
        family: Row of the family table.
        parts: Of ``"vision"``, ``"projector"``, ``"language"`` (with its head). All three together are the whole model.

    Returns:
        Parameters by full name, sorted.

    Raises:
        LoraError: A part has no parameters, or is stored quantised.
    """
    wanted = set(parts)
    found: dict[str, torch.nn.Parameter] = {}
    seen = set()
    for name, parameter in model.named_parameters():
        part = family.part_of(name)
        part = "language" if part == "head" else part
        seen.add(part)
        if part in wanted or wanted == _ALL_PARTS:
            found[name] = parameter
    if wanted - seen:
        raise LoraError(
            f"lora.full_finetuning names {min(wanted - seen)!r}, of which {family.title} has no weights; leave it out"
        )
    for name, parameter in found.items():
        if not parameter.is_floating_point():
            raise LoraError(
                f"lora.full_finetuning reaches {name!r}, which is stored in {parameter.dtype} and cannot be trained; set"
                " model.quantization to 'none'"
            )
    return dict(sorted(found.items()))


def describe_full(loaded: LoadedModel, lora: LoraConfig) -> dict[str, Any]:
    """What learns, in the fields of an adapter's ``targets.json``.

    Args:
        loaded: The base model.
        lora: Settings with `full_finetuning`.

    Returns:
        Counts of parameter tensors and parameters.
    """
    parameters = trained_whole(loaded.model, loaded.family, lora.full_finetuning)
    return {
        "num_targets": len(parameters),
        "num_targets_by_part": dict(
            sorted(Counter(loaded.family.part_of(name) or "other" for name in parameters).items())
        ),
        "num_trainable_parameters": sum(parameter.numel() for parameter in parameters.values()),
    }


def attach_full(loaded: LoadedModel, adapter_dir: Path, *, trainable: bool) -> Any:
    """Puts trained weights into the base model, in place; `detach_full` undoes that.

    Weights that wait in the host's memory for another device stay as they are stored, which is half as large and shared by
    the processes that read the same file: whoever moves them makes them float32.

    Args:
        loaded: The base model.
        adapter_dir: Folder of the artifact; without a weights file, training starts from the base's own weights.
        trainable: Whether the weights learn; they are then float32.

    Returns:
        The base model itself, in evaluation mode.

    Raises:
        LoraError: The weights do not fit exactly.
    """
    model: Any = loaded.model
    parameters = trained_whole(model, loaded.family, full_parts(adapter_dir))
    before = {
        # Out of the GPU's way while float32 copies lie there.
        name: _Before(parameter.data.to("cpu") if name in parameters else parameter.data, parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }
    setattr(model, WHOLE_ATTRIBUTE, parameters)
    model.full_finetuning_before = before
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable and name in parameters)
        has_weights = (adapter_dir / WEIGHTS_FILE).is_file()
        for parameter in parameters.values():
            if has_weights or parameter.device.type == loaded.device:
                parameter.data = parameter.data.to(torch.float32 if trainable else parameter.dtype, copy=True)
        if has_weights:
            load_tensors(model, adapter_dir / WEIGHTS_FILE)
        elif not trainable:
            raise LoraError(f"{adapter_dir} has no {WEIGHTS_FILE}, so nothing has been trained yet; train first")
    except BaseException:
        detach_full(model)
        raise
    return model.eval()


def detach_full(model: Any) -> None:
    """Gives a model its own weights back.

    Args:
        model: What `attach_full` gave.
    """
    for name, parameter in model.named_parameters():
        before = model.full_finetuning_before[name]
        parameter.data = before.data.to(parameter.device)
        parameter.requires_grad_(before.requires_grad)
        parameter.grad = None
    delattr(model, WHOLE_ATTRIBUTE)
    del model.full_finetuning_before
