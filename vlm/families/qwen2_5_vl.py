"""Qwen2.5-VL: vision tower with window attention in most layers, gated feed-forward blocks."""

from __future__ import annotations

import dataclasses

from vlm.families import qwen_video
from vlm.families.gguf import QWEN2_5_VL_GGUF
from vlm.families.qwen2_vl import QWEN2_VL

QWEN2_5_VL = dataclasses.replace(
    QWEN2_VL,
    model_type="qwen2_5_vl",
    title="Qwen2.5-VL",
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    config_types=("qwen2_5_vl",),
    model_class="Qwen2_5_VLForConditionalGeneration",
    vision_mlp=r"model\.visual\.blocks\.\d+\.mlp\.(gate|up|down)_proj",
    video=qwen_video.IN_SECONDS,
    box_convention="absolute",
    gguf=QWEN2_5_VL_GGUF,
)
