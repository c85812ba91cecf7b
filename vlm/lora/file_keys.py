"""Under which names an adapter's tensors stand in its file, so that plain peft finds them too.

peft names a tensor after its module. When it reads a file, it applies the renaming that transformers has for the
model's weights, since older files have older names. For most models that leaves today's names alone. For some it does
not: where `model.layers` became `model.language_model.layers`, the rule finds `model.layers` inside the new name again
and makes `model.language_model.language_model.layers` of it. peft then only warns, and the adapter stays as it was
initialised. So names that would not survive are turned back first, and the rule turns them forth again.

Expert parameters have no module of their own: peft puts a wrapper around the module for each, and names its tensors
after the depth. Which parameter a name belongs to is written down in the adapter's list of targets.

Loads torch, transformers and peft.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlm.errors import LoraError

if TYPE_CHECKING:
    from peft import PeftModel

PREFIX = "base_model.model."
_ADAPTER = "default"


def file_keys(peft_model: PeftModel, names: Sequence[str]) -> dict[str, str]:
    """Maps the names that peft gives an adapter's tensors to those in the file.

    Args:
        peft_model: A model with an adapter.
        names: Names without the adapter's own name, with `base_model.model.` before them.

    Returns:
        File keys by name. Tensors of whole modules keep their names, which peft does not rename.

    Raises:
        LoraError: Neither today's names nor the older ones come back from peft's renaming.
    """
    renamed = [name for name in names if ".lora_" in name]
    if _as_peft_reads(peft_model, renamed) == renamed:
        return {name: name for name in names}
    older = [
        PREFIX + key
        for key in _turned_back(peft_model.get_base_model(), [name.removeprefix(PREFIX) for name in renamed])
    ]
    found = _as_peft_reads(peft_model, older)
    lost = [name for name, back in zip(renamed, found, strict=True) if name != back]
    if lost:
        raise LoraError(
            f"peft would read {lost[0]!r} ({len(lost)} such) back under another name, so that the saved adapter would be"
            " ignored; use another version of peft or transformers"
        )
    return {name: name for name in names} | dict(zip(renamed, older, strict=True))


def target_keys(peft_model: PeftModel, targets: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What a list of targets has to say about those whose tensors are not named after them.

    Args:
        peft_model: A model with a fresh adapter.
        targets: Full names of the adapted modules and parameters.

    Returns:
        By target: ``key``, what stands before ``.lora_A.weight`` in the file (without `base_model.model.`), and for
        expert parameters ``num_experts``.
    """
    from peft.tuners.lora.layer import ParamWrapper

    base = peft_model.get_base_model()
    live = {}
    experts = {}
    for name, module in base.named_modules():
        if isinstance(module, ParamWrapper):
            owner = name
            while owner.endswith(".base_layer"):
                owner = owner.removesuffix(".base_layer")
            target = f"{owner}.{module.parameter_name}"
            live[target] = name
            experts[target] = module.num_experts
    prefixes = {target: live.get(target, target) for target in targets}
    suffix = ".lora_A.weight"
    keys = file_keys(peft_model, [f"{PREFIX}{prefix}{suffix}" for prefix in prefixes.values()])
    found: dict[str, dict[str, Any]] = {}
    for target, prefix in prefixes.items():
        key = keys[f"{PREFIX}{prefix}{suffix}"].removeprefix(PREFIX).removesuffix(suffix)
        if key != target:
            found[target] = {"key": key}
        if target in experts:
            found.setdefault(target, {})["num_experts"] = experts[target]
    return found


def key_of(target: Mapping[str, Any]) -> str:
    """What stands before ``.lora_A.weight`` in the file for one entry of a list of targets."""
    return str(target.get("key", target["name"]))


def _as_peft_reads(peft_model: PeftModel, names: Sequence[str]) -> list[str | None]:
    """The names under which peft would look for the places of a file's tensors; None for what it would drop."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    # Each name travels as a number, so that it is found again whatever happens to it.
    numbered = {name: torch.tensor([number]) for number, name in enumerate(names)}
    read = convert_peft_adapter_state_dict_for_transformers(
        peft_model, peft_model.peft_config[_ADAPTER], numbered, _ADAPTER
    )
    back: list[str | None] = [None] * len(names)
    for name, number in read.items():
        back[int(number)] = name
    return back


def _turned_back(model: Any, names: Sequence[str]) -> list[str]:
    """The older names of a model's tensors, by transformers' own rules without those that join or cut weights."""
    from vlm.loading.stored_names import older_names

    return older_names(model, names)
