"""One row per family of models; a branch on the family anywhere else is a missing field here."""

from vlm.families.family import (
    Family,
    ImageLayout,
    MediaParts,
    PackedSamples,
    Packing,
    Run,
    context_length_tokens,
    text_config,
)
from vlm.families.table import FAMILIES, family_by_name, family_for_config

__all__ = [
    "FAMILIES",
    "Family",
    "ImageLayout",
    "MediaParts",
    "PackedSamples",
    "Packing",
    "Run",
    "context_length_tokens",
    "family_by_name",
    "family_for_config",
    "text_config",
]
