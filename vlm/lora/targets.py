"""Which modules and expert parameters an adapter adapts, as exact full names.

The weights of routed experts are 3-D parameters and no modules; they count as layers here all the same: a switch, a
target or an exclusion reaches them by name.

Imports neither torch nor peft: names come from a live model or from any list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm.config import LoraConfig
from vlm.errors import LoraError, near_names

if TYPE_CHECKING:
    from vlm.families import Family


# Reaches routed experts and no shared ones; for the remedy of an error.
EXPERTS_PATTERN = r".*\.experts\..*"


@dataclass(frozen=True)
class Selection:
    """The chosen modules."""

    targets: tuple[str, ...]
    """Full names of the adapted modules, in the model's order, and behind them those of the adapted expert parameters."""
    ranks: dict[str, int]
    """Rank of each target."""
    modules_to_save: tuple[str, ...]
    """Full names of the modules trained whole."""
    parameters: tuple[str, ...] = ()
    """Those of the targets that are expert parameters."""


def linear_names(model: Any) -> list[str]:
    """Full names of the linear layers of a live model, quantised ones included, in the model's order."""
    import torch

    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def adaptable_names(model: Any, family: Family) -> list[str]:
    """Full names of the linear layers of a live model, and behind them those of its expert parameters."""
    return [*linear_names(model), *expert_names([name for name, _ in model.named_parameters()], family)]


def expert_names(names: Iterable[str], family: Family) -> list[str]:
    """Those of some names that are expert parameters of the family."""
    pattern = family.language_expert_parameters
    return [] if pattern is None else [name for name in names if re.fullmatch(pattern, name)]


def select_targets(model_or_names: Any, family: Family, lora: LoraConfig) -> list[str]:
    """Chooses the adapted modules.

    Args:
        model_or_names: A live model without adapter, or the full names of its linear layers and expert parameters.
        family: Row of the family table.
        lora: Switches, or explicit targets instead of them, and exclusions.

    Returns:
        Exact full names, in the model's order.

    Raises:
        LoraError: A target or an exclusion matches nothing, nothing is left, or experts are to have what they cannot.
    """
    names = list(model_or_names) if isinstance(model_or_names, Sequence) else adaptable_names(model_or_names, family)
    if lora.target_modules:
        chosen = {name for target in lora.target_modules for name in _matches(target, names, "lora.target_modules")}
    else:
        chosen = {name for pattern in switched_patterns(family, lora) for name in names if re.fullmatch(pattern, name)}
    chosen = _in_last_layers(names, chosen, family, lora)
    excluded = {name for target in lora.exclude_modules for name in _matches(target, names, "lora.exclude_modules")}
    targets = [name for name in names if name in chosen and name not in excluded]
    heads = [name for name in targets if family.part_of(name) == "head"]
    if heads:
        # trl's fused loss reads the head's weight directly, so an adapter on it would never learn.
        raise LoraError(
            f"lora.target_modules reaches the language-model head {heads[0]!r}, which cannot carry an adapter in training;"
            " put it into lora.modules_to_save, or leave it out with lora.exclude_modules"
        )
    experts = expert_names(targets, family)
    variants = [name for name, on in (("lora.dropout", lora.dropout), ("lora.use_dora", lora.use_dora)) if on]
    if experts and variants:
        # An expert's update is added to its weight, so there is no input of the update to drop from, and peft has no
        # DoRA for it.
        raise LoraError(
            f"{variants[0]} cannot be had for routed experts such as {experts[0]!r}; turn it off, or leave them out with"
            f" lora.exclude_modules: [{EXPERTS_PATTERN!r}]"
        )
    if not targets and not lora.modules_to_save:
        raise LoraError(
            f"no linear layer of the model is adapted ({len(chosen)} chosen, {len(excluded)} excluded);"
            " turn on another finetune_* switch or exclude less"
        )
    return targets


def switched_patterns(family: Family, lora: LoraConfig) -> list[str]:
    """The family's patterns that the switches turn on.

    Raises:
        LoraError: The projector is switched on and has no linear layer.
    """
    on = []
    for tower, attention, mlp in (
        (lora.finetune_vision_layers, family.vision_attention, family.vision_mlp),
        (lora.finetune_language_layers, family.language_attention, family.language_mlp),
    ):
        if tower and lora.finetune_attention_modules:
            on.append(attention)
        if tower and lora.finetune_mlp_modules:
            on.append(mlp)
    if lora.finetune_language_layers and lora.finetune_mlp_modules and family.language_expert_parameters is not None:
        on.append(family.language_expert_parameters)
    if lora.finetune_projector and family.projector is None:
        raise LoraError(
            f"lora.finetune_projector is on, but the projector of {family.title} is a bare weight without a linear layer"
            " that could carry an adapter; turn it off, or train the projector whole with"
            " lora.modules_to_save: ['multi_modal_projector']"
        )
    if lora.finetune_projector and family.projector is not None:
        on.append(family.projector)
    return on


def _in_last_layers(names: Sequence[str], chosen: set[str], family: Family, lora: LoraConfig) -> set[str]:
    """Leaves out targets in layers before the last ones that the settings ask for; targets outside layers stay.

    Layers of several vision encoders count together, in the model's order.
    """
    for setting, pattern in (
        ("last_language_layers", family.language_layer),
        ("last_vision_layers", family.vision_layer),
    ):
        number = getattr(lora, setting)
        if number is None:
            continue
        layer_of = {name: _layer_of(name, pattern) for name in names}
        layers = list(dict.fromkeys(layer for layer in layer_of.values() if layer is not None))
        if number > len(layers):
            raise LoraError(
                f"lora.{setting} is {number} but the model has {len(layers)} such layers; lower it, or leave it out to adapt"
                " all"
            )
        if not any(layer_of[name] for name in chosen):
            raise LoraError(f"lora.{setting} is {number} but no target is in such a layer; leave it out")
        left_out = set(layers[: len(layers) - number])
        chosen = {name for name in chosen if layer_of[name] not in left_out}
    return chosen


def _layer_of(name: str, pattern: str) -> str | None:
    """The layer that a module is in: its shortest prefix that matches."""
    words = name.split(".")
    prefixes = (".".join(words[:length]) for length in range(1, len(words) + 1))
    return next((prefix for prefix in prefixes if re.fullmatch(pattern, prefix)), None)


def select(model: Any, family: Family, lora: LoraConfig) -> Selection:
    """Resolves everything in a LoRA configuration that names modules.

    Args:
        model: A live model without adapter.
        family: Row of the family table.
        lora: The configuration.

    Raises:
        LoraError: A name matches nothing, or one module is both adapted and trained whole.
    """
    targets = select_targets(model, family, lora)
    ranks = dict.fromkeys(targets, lora.rank)
    for pattern, rank in lora.rank_pattern.items():
        ranks.update(dict.fromkeys(_matches(pattern, targets, "lora.rank_pattern"), rank))
    modules = [name for name, _ in model.named_modules() if name]
    whole = {name for target in lora.modules_to_save for name in _matches(target, modules, "lora.modules_to_save")}
    both = sorted(target for target in targets for name in whole if target == name or target.startswith(f"{name}."))
    if both:
        raise LoraError(
            f"{both[0]!r} is adapted and also in lora.modules_to_save; exclude it from one of them, for example with"
            f" lora.exclude_modules: [{both[0]!r}]"
        )
    return Selection(
        targets=tuple(targets),
        ranks=ranks,
        modules_to_save=tuple(name for name in modules if name in whole),
        parameters=tuple(expert_names(targets, family)),
    )


def _matches(target: str, names: Iterable[str], setting: str) -> list[str]:
    """Names equal to a target, ending with it, or matched by it as a regular expression; the first that hits counts."""
    names = list(names)
    found = [name for name in names if name == target or name.endswith(f".{target}")]
    if found:
        return found
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise LoraError(
            f"{setting} has {target!r}, which is neither a module's name nor a regular expression ({error})"
        ) from error
    found = [name for name in names if pattern.fullmatch(name)]
    if not found:
        endings = {name.rsplit(".", 1)[-1] for name in names}
        known = names if "." in target else endings
        raise LoraError(f"{setting} has {target!r}, which matches no layer. {near_names(target, known)}")
    return found
