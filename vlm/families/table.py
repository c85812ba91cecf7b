"""The table of families, and the way from a `config.json` to a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm.errors import ModelError, near_names
from vlm.families.deepseek_ocr import DEEPSEEK_OCR
from vlm.families.deepseek_ocr2 import DEEPSEEK_OCR2
from vlm.families.family import Family
from vlm.families.idefics3 import IDEFICS3
from vlm.families.lighton_ocr import LIGHTON_OCR
from vlm.families.mistral3 import MISTRAL3
from vlm.families.mllama import MLLAMA
from vlm.families.paddleocr_vl import PADDLEOCR_VL
from vlm.families.pixtral import PIXTRAL
from vlm.families.qwen2_5_vl import QWEN2_5_VL
from vlm.families.qwen2_vl import QWEN2_VL
from vlm.families.smolvlm import SMOLVLM

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        QWEN2_VL,
        QWEN2_5_VL,
        MLLAMA,
        PIXTRAL,
        MISTRAL3,
        DEEPSEEK_OCR,
        DEEPSEEK_OCR2,
        IDEFICS3,
        SMOLVLM,
        PADDLEOCR_VL,
        LIGHTON_OCR,
    )
}


def family_for_config(config: Mapping[str, Any]) -> Family:
    """Finds the family of a checkpoint.

    Architectures decide, since some models share a `model_type`; the latter counts where no architecture is given. Where
    an architecture stands for models with all sorts of vision towers, the tower's type has to fit as well.

    Args:
        config: Content of the checkpoint's `config.json`.

    Raises:
        ModelError: No family of the table fits; lists the known architectures.
    """
    architectures = config.get("architectures") or []
    for family in FAMILIES.values():
        if any(architecture in family.architectures for architecture in architectures) and _tower_fits(family, config):
            return family
    model_type = config.get("model_type")
    if not architectures:
        for family in FAMILIES.values():
            if model_type in family.config_types and _tower_fits(family, config):
                return family
    found = f"architecture {architectures[0]!r}" if architectures else "no architecture"
    found += f" and model_type {model_type!r}"
    tower = _tower_type(config)
    found += f" with a {tower!r} vision tower" if tower is not None else ""
    known = sorted(architecture for family in FAMILIES.values() for architecture in family.architectures)
    raise ModelError(
        f"config.json has {found}, which is none of the supported families; "
        f"use a checkpoint of one of {', '.join(repr(name) for name in known)}"
    )


def _tower_type(config: Mapping[str, Any]) -> Any:
    vision = config.get("vision_config")
    return vision.get("model_type") if isinstance(vision, Mapping) else None


def _tower_fits(family: Family, config: Mapping[str, Any]) -> bool:
    return not family.vision_types or _tower_type(config) in family.vision_types


def family_by_name(model_type: str) -> Family:
    """The row of that name.

    Raises:
        ModelError: There is none; lists near names.
    """
    if model_type not in FAMILIES:
        raise ModelError(f"{model_type!r} is no family of the table. {near_names(model_type, FAMILIES)}")
    return FAMILIES[model_type]
