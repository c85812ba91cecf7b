"""The table of families, and the way from a `config.json` to a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm.errors import ModelError, near_names
from vlm.families.family import Family
from vlm.families.qwen2_5_vl import QWEN2_5_VL
from vlm.families.qwen2_vl import QWEN2_VL

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN2_VL, QWEN2_5_VL)}


def family_for_config(config: Mapping[str, Any]) -> Family:
    """Finds the family of a checkpoint.

    Architectures decide, since some models share a `model_type`; the latter counts where no architecture is given.

    Args:
        config: Content of the checkpoint's `config.json`.

    Raises:
        ModelError: No family of the table fits; lists the known architectures.
    """
    architectures = config.get("architectures") or []
    for family in FAMILIES.values():
        if any(architecture in family.architectures for architecture in architectures):
            return family
    model_type = config.get("model_type")
    if not architectures:
        for family in FAMILIES.values():
            if model_type in family.config_types:
                return family
    found = f"architecture {architectures[0]!r}" if architectures else "no architecture"
    known = sorted(architecture for family in FAMILIES.values() for architecture in family.architectures)
    raise ModelError(
        f"config.json has {found} and model_type {model_type!r}, which is none of the supported families; "
        f"use a checkpoint of one of {', '.join(repr(name) for name in known)}"
    )


def family_by_name(model_type: str) -> Family:
    """The row of that name.

    Raises:
        ModelError: There is none; lists near names.
    """
    if model_type not in FAMILIES:
        raise ModelError(f"{model_type!r} is no family of the table. {near_names(model_type, FAMILIES)}")
    return FAMILIES[model_type]
