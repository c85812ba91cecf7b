"""Gemma 3 with vision: a SigLIP tower, pooled to a fixed number of tokens, that see each other in both directions."""

from __future__ import annotations

from vlm.families import gemma3_media
from vlm.families.family import Family

_VISION_LAYER = r"model\.vision_tower\.encoder\.layers\.\d+"

GEMMA3 = Family(
    model_type="gemma3",
    title="Gemma 3",
    architectures=("Gemma3ForConditionalGeneration",),
    config_types=("gemma3",),
    model_class="Gemma3ForConditionalGeneration",
    image_processor_class="Gemma3ImageProcessorPil",
    language_attention=r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    language_mlp=r"model\.language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    vision_attention=_VISION_LAYER + r"\.self_attn\.([qkv]|out)_proj",
    vision_mlp=_VISION_LAYER + r"\.mlp\.fc[12]",
    projector=None,
    language_layer=r"model\.language_model\.layers\.\d+",
    vision_layer=_VISION_LAYER,
    parts=(
        ("head", r"lm_head(\..+)?"),
        ("projector", r"model\.multi_modal_projector(\..+)?"),
        ("vision", r"model\.vision_tower(\..+)?"),
        ("language", r"model\.language_model(\..+)?"),
    ),
    image_placeholder=gemma3_media.PLACEHOLDER,
    image_token=gemma3_media.IMAGE_TOKEN,
    media_tokens=gemma3_media.MEDIA_TOKENS,
    target_size=gemma3_media.target_size,
    image_layout=gemma3_media.image_layout,
    pixel_inputs=gemma3_media.pixel_inputs,
    token_inputs=gemma3_media.token_inputs,
    patches_per_token=gemma3_media.patches_per_token,
)
