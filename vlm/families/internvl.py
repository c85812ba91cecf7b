"""InternVL (InternVL 2.5, 3 and 3.5 in transformers' layout): a page in tiles before a Qwen language model."""

from __future__ import annotations

from vlm.families import internvl_media
from vlm.families.family import Family, Packing

INTERNVL = Family(
    model_type="internvl",
    title="InternVL",
    architectures=("InternVLForConditionalGeneration",),
    config_types=("internvl",),
    model_class="InternVLForConditionalGeneration",
    image_processor_class="GotOcr2ImageProcessorPil",
    language_attention=r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    language_mlp=r"model\.language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    vision_attention=r"model\.vision_tower\.encoder\.layer\.\d+\.attention\.([qkv]_proj|projection_layer)",
    vision_mlp=r"model\.vision_tower\.encoder\.layer\.\d+\.mlp\.fc[12]",
    projector=r"model\.multi_modal_projector\.linear_[12]",
    language_layer=r"model\.language_model\.layers\.\d+",
    vision_layer=r"model\.vision_tower\.encoder\.layer\.\d+",
    parts=(
        ("head", r"lm_head(\..+)?"),
        ("projector", r"model\.multi_modal_projector(\..+)?"),
        ("vision", r"model\.vision_tower(\..+)?"),
        ("language", r"model\.language_model(\..+)?"),
    ),
    image_placeholder=internvl_media.IMAGE_TOKEN,
    image_token=internvl_media.IMAGE_TOKEN,
    media_tokens=internvl_media.MEDIA_TOKENS,
    markup_tokens=internvl_media.MARKUP_TOKENS,
    target_size=internvl_media.target_size,
    image_layout=internvl_media.image_layout,
    pixel_inputs=internvl_media.pixel_inputs,
    token_inputs=internvl_media.token_inputs,
    patches_per_token=internvl_media.patches_per_token,
    packing=Packing(tower_segments=False),
)
