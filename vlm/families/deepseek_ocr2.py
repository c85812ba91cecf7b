"""DeepSeek-OCR 2: SAM, then a small language model that reads its patches through queries, and the same kind of decoder."""

from __future__ import annotations

import dataclasses
from functools import partial

from vlm.families import deepseek_media
from vlm.families.deepseek_ocr import DEEPSEEK_OCR

DEEPSEEK_OCR2 = dataclasses.replace(
    DEEPSEEK_OCR,
    model_type="deepseek_ocr2",
    title="DeepSeek-OCR 2",
    architectures=("DeepseekOcr2ForConditionalGeneration",),
    config_types=("deepseek_ocr2",),
    model_class="DeepseekOcr2ForConditionalGeneration",
    vision_attention=(
        r"model\.vision_tower\.(sam_encoder\.layers\.\d+\.attn\.(qkv|proj)"
        r"|vision_encoder\.layers\.\d+\.self_attn\.[qkvo]_proj)"
    ),
    vision_mlp=(
        r"model\.vision_tower\.(sam_encoder\.layers\.\d+\.mlp\.lin[12]"
        r"|vision_encoder\.layers\.\d+\.mlp\.(gate|up|down)_proj)"
    ),
    vision_layer=r"model\.vision_tower\.(sam_encoder|vision_encoder)\.layers\.\d+",
    image_layout=deepseek_media.queries_layout,
    pixel_inputs=partial(deepseek_media.pixel_inputs, with_grids=False, global_view=deepseek_media.padded_like_stock),
    translate_config=None,
    image_processor_defaults=None,
)
