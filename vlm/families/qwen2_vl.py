"""Qwen2-VL: vision tower with full attention, two-layer feed-forward blocks."""

from __future__ import annotations

from vlm.families import qwen_media, qwen_packing, qwen_video
from vlm.families.family import Family, Packing
from vlm.families.gguf import QWEN2_VL_GGUF

QWEN2_VL = Family(
    model_type="qwen2_vl",
    title="Qwen2-VL",
    architectures=("Qwen2VLForConditionalGeneration",),
    config_types=("qwen2_vl",),
    model_class="Qwen2VLForConditionalGeneration",
    image_processor_class="Qwen2VLImageProcessorPil",
    language_attention=r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    language_mlp=r"model\.language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    vision_attention=r"model\.visual\.blocks\.\d+\.attn\.(qkv|proj)",
    vision_mlp=r"model\.visual\.blocks\.\d+\.mlp\.fc[12]",
    projector=r"model\.visual\.merger\.mlp\.[02]",
    language_layer=r"model\.language_model\.layers\.\d+",
    vision_layer=r"model\.visual\.blocks\.\d+",
    parts=(
        ("head", r"lm_head(\..+)?"),
        ("projector", r"model\.visual\.merger(\..+)?"),
        ("vision", r"model\.visual(\..+)?"),
        ("language", r"model\.language_model(\..+)?"),
    ),
    image_placeholder=qwen_media.IMAGE_TOKEN,
    image_token=qwen_media.IMAGE_TOKEN,
    media_tokens=qwen_media.MEDIA_TOKENS,
    markup_tokens=qwen_media.MARKUP_TOKENS,
    target_size=qwen_media.target_size,
    image_layout=qwen_media.image_layout,
    pixel_inputs=qwen_media.pixel_inputs,
    token_inputs=qwen_media.token_inputs,
    video=qwen_video.IN_STEPS,
    packing=Packing(tower_segments=True, positions=qwen_packing.positions, tower_inputs=qwen_packing.tower_inputs),
    gguf=QWEN2_VL_GGUF,
)
