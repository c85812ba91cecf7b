"""Pixtral: a Mistral language model behind a vision tower at native resolution, in transformers' LLaVA classes."""

from __future__ import annotations

from vlm.families import pixtral_media, pixtral_packing
from vlm.families.family import Family, Packing
from vlm.families.gguf import PIXTRAL_GGUF

PIXTRAL = Family(
    model_type="pixtral",
    title="Pixtral",
    architectures=("LlavaForConditionalGeneration",),
    config_types=("llava",),
    vision_types=("pixtral",),
    model_class="LlavaForConditionalGeneration",
    image_processor_class="PixtralImageProcessorPil",
    language_attention=r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    language_mlp=r"model\.language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    vision_attention=r"model\.vision_tower\.transformer\.layers\.\d+\.attention\.[qkvo]_proj",
    vision_mlp=r"model\.vision_tower\.transformer\.layers\.\d+\.feed_forward\.(gate|up|down)_proj",
    projector=r"model\.multi_modal_projector\.linear_[12]",
    language_layer=r"model\.language_model\.layers\.\d+",
    vision_layer=r"model\.vision_tower\.transformer\.layers\.\d+",
    parts=(
        ("head", r"lm_head(\..+)?"),
        ("projector", r"model\.multi_modal_projector(\..+)?"),
        ("vision", r"model\.vision_tower(\..+)?"),
        ("language", r"model\.language_model(\..+)?"),
    ),
    image_placeholder=pixtral_media.IMAGE_TOKEN,
    image_token=pixtral_media.IMAGE_TOKEN,
    media_tokens=pixtral_media.MEDIA_TOKENS,
    target_size=pixtral_media.target_size,
    image_layout=pixtral_media.image_layout,
    pixel_inputs=pixtral_media.pixel_inputs,
    token_inputs=pixtral_media.token_inputs,
    packing=Packing(tower_segments=True, install=pixtral_packing.install),
    gguf=PIXTRAL_GGUF,
)
