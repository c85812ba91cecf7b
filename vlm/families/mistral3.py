"""Mistral 3 (Mistral Small 3.1 and later): Pixtral's tower, with a projector that merges squares of patches first."""

from __future__ import annotations

import dataclasses

from vlm.families.gguf import PIXTRAL_GGUF
from vlm.families.pixtral import PIXTRAL

MISTRAL3 = dataclasses.replace(
    PIXTRAL,
    model_type="mistral3",
    title="Mistral 3",
    architectures=("Mistral3ForConditionalGeneration",),
    config_types=("mistral3",),
    model_class="Mistral3ForConditionalGeneration",
    gguf=dataclasses.replace(PIXTRAL_GGUF, pre_tokenizer="tekken"),
    projector=r"model\.multi_modal_projector\.(linear_[12]|patch_merger\.merging_layer)",
)
