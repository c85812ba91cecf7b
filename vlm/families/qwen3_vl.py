"""Qwen3-VL (dense): merged features of some vision layers are also added to the first layers of the language model."""

from __future__ import annotations

import dataclasses

from vlm.families.qwen2_vl import QWEN2_VL

# The merger behind the last vision layer, and those behind the layers whose features go in deeper ("DeepStack").
_MERGERS = r"model\.visual\.(merger|deepstack_merger_list\.\d+)"

QWEN3_VL = dataclasses.replace(
    QWEN2_VL,
    model_type="qwen3_vl",
    title="Qwen3-VL",
    architectures=("Qwen3VLForConditionalGeneration",),
    config_types=("qwen3_vl",),
    model_class="Qwen3VLForConditionalGeneration",
    vision_mlp=r"model\.visual\.blocks\.\d+\.mlp\.linear_fc[12]",
    # Its films have their times written between the frames, unlike those of the family it is made from.
    video=None,
    gguf=None,
    projector=_MERGERS + r"\.linear_fc[12]",
    parts=(
        ("head", r"lm_head(\..+)?"),
        ("projector", r"model\.visual\.(merger|deepstack_merger_list)(\..+)?"),
        ("vision", r"model\.visual(\..+)?"),
        ("language", r"model\.language_model(\..+)?"),
    ),
)
