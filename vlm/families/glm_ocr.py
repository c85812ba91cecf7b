"""GLM-OCR: a vision tower like Qwen2.5-VL's before a small GLM language model, whose turns end where the next one begins."""

from __future__ import annotations

from functools import partial

from vlm.families import glm_media, qwen_media, qwen_packing
from vlm.families.family import Family, Packing

GLM_OCR = Family(
    model_type="glm_ocr",
    title="GLM-OCR",
    architectures=("GlmOcrForConditionalGeneration",),
    config_types=("glm_ocr",),
    model_class="GlmOcrForConditionalGeneration",
    image_processor_class="Glm46VImageProcessorPil",
    language_attention=r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    language_mlp=r"model\.language_model\.layers\.\d+\.mlp\.(gate_up|down)_proj",
    vision_attention=r"model\.visual\.blocks\.\d+\.attn\.(qkv|proj)",
    vision_mlp=r"model\.visual\.blocks\.\d+\.mlp\.(gate|up|down)_proj",
    projector=r"model\.visual\.merger\.((gate_|up_|down_)?proj)",
    language_layer=r"model\.language_model\.layers\.\d+",
    vision_layer=r"model\.visual\.blocks\.\d+",
    parts=(
        ("head", r"lm_head(\..+)?"),
        # A convolution joins squares of patches, then the merger follows.
        ("projector", r"model\.visual\.(downsample|merger)(\..+)?"),
        ("vision", r"model\.visual(\..+)?"),
        ("language", r"model\.language_model(\..+)?"),
    ),
    image_placeholder=glm_media.IMAGE_TOKEN,
    image_token=glm_media.IMAGE_TOKEN,
    media_tokens=glm_media.MEDIA_TOKENS,
    target_size=glm_media.target_size,
    image_layout=partial(qwen_media.image_layout, image_token=glm_media.IMAGE_TOKEN),
    pixel_inputs=qwen_media.pixel_inputs,
    token_inputs=glm_media.token_inputs,
    answer_end="<|user|>",
    packing=Packing(
        tower_segments=True,
        positions=partial(qwen_packing.positions, image_token=glm_media.IMAGE_TOKEN, video_token="<|video|>"),
        tower_inputs=qwen_packing.tower_inputs,
    ),
)
