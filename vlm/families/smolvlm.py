"""SmolVLM: Idefics3's architecture at small sizes, under class names of its own."""

from __future__ import annotations

import dataclasses

from vlm.families import smolvlm_merging
from vlm.families.idefics3 import IDEFICS3

SMOLVLM = dataclasses.replace(
    IDEFICS3,
    model_type="smolvlm",
    title="SmolVLM",
    architectures=("SmolVLMForConditionalGeneration",),
    config_types=("smolvlm",),
    model_class="SmolVLMForConditionalGeneration",
    image_processor_class="SmolVLMImageProcessorPil",
    # Checkpoints name GPT-2's, which would cut numbers in another way than the tokenizer.json beside it.
    tokenizer_class="PreTrainedTokenizerFast",
    prepare_model=smolvlm_merging.merge_in_one_precision,
)
