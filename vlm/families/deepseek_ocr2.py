"""DeepSeek-OCR 2: SAM, then a small language model that reads its patches through queries, and the same kind of decoder."""

from __future__ import annotations

import dataclasses
from functools import partial

from vlm.families import deepseek2_config, deepseek_media
from vlm.families.deepseek_ocr import DEEPSEEK_OCR

DEEPSEEK_OCR2 = dataclasses.replace(
    DEEPSEEK_OCR,
    model_type="deepseek_ocr2",
    title="DeepSeek-OCR 2",
    architectures=("DeepseekOCR2ForCausalLM", deepseek2_config.NATIVE_ARCHITECTURE),
    config_types=(deepseek2_config.NATIVE_TYPE,),
    model_class=deepseek2_config.NATIVE_ARCHITECTURE,
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
    translate_config=deepseek2_config.translate,
    image_processor_defaults={
        **(DEEPSEEK_OCR.image_processor_defaults or {}),
        "image_processor_type": "DeepseekOcr2ImageProcessor",
        "max_patches": 6,
        "processor_class": "DeepseekOcr2Processor",
        "tile_size": 768,
    },
)
