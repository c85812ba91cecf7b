"""Separate learning rates: the optimiser's parameter groups, split by part of the model. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from vlm.config import TrainingConfig
from vlm.errors import ConfigError

if TYPE_CHECKING:
    from vlm.families import Family

_PEFT_PREFIX = "base_model.model."


def rates_by_part(training: TrainingConfig) -> dict[str, float]:
    """Peak learning rates that differ from the general one, by part.

    Args:
        training: Settings.
    """
    rates = {"vision": training.vision_learning_rate, "projector": training.projector_learning_rate}
    return {part: rate for part, rate in rates.items() if rate is not None}


def check_rates(training: TrainingConfig, trained_parts: Collection[str | None]) -> None:
    """Refuses a learning rate for a part in which nothing learns.

    Args:
        training: Settings.
        trained_parts: Parts with a parameter that learns.

    Raises:
        ConfigError: Names the setting.
    """
    for part, rate in rates_by_part(training).items():
        if part not in trained_parts:
            switch = "finetune_vision_layers" if part == "vision" else "finetune_projector"
            raise ConfigError(
                f"training.{part}_learning_rate is {rate} but nothing in the {part} learns; turn lora.{switch} on (or name"
                f" it in lora.full_finetuning), or leave the rate out"
            )


def split_groups(
    groups: list[dict[str, Any]], names: Mapping[Any, str], family: Family, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Splits parameter groups by part, each with its learning rate; all else stays.

    Args:
        groups: Of an optimiser that has made no step.
        names: Full name by parameter, with or without peft's prefix.
        family: Row of the family table.
        rates: Learning rate by part; other parts keep their group's.

    Returns:
        Groups without empty ones. Those with the general rate come first: trainers log the first group's.
    """
    general, special = [], []
    for group in groups:
        by_part: dict[str | None, list[Any]] = {}
        for parameter in group["params"]:
            part = family.part_of(names[parameter].removeprefix(_PEFT_PREFIX))
            by_part.setdefault(part if part in rates else None, []).append(parameter)
        for chosen, parameters in sorted(by_part.items(), key=lambda item: item[0] or ""):
            if chosen is None:
                general.append({**group, "params": parameters})
            else:
                special.append({**group, "params": parameters, "lr": rates[chosen]})
    return general + special
