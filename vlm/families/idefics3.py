"""Idefics3: a SigLIP tower that sees an image in square tiles, a Llama behind it; Granite-Docling has the same architecture."""

from __future__ import annotations

from vlm.families import idefics3_media
from vlm.families.family import Family, Packing

IDEFICS3 = Family(
    model_type="idefics3",
    title="Idefics3",
    architectures=("Idefics3ForConditionalGeneration",),
    config_types=("idefics3",),
    model_class="Idefics3ForConditionalGeneration",
    image_processor_class="Idefics3ImageProcessorPil",
    language_attention=r"model\.text_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    language_mlp=r"model\.text_model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    vision_attention=r"model\.vision_model\.encoder\.layers\.\d+\.self_attn\.([qkv]|out)_proj",
    vision_mlp=r"model\.vision_model\.encoder\.layers\.\d+\.mlp\.fc[12]",
    projector=r"model\.connector\.modality_projection\.proj",
    language_layer=r"model\.text_model\.layers\.\d+",
    vision_layer=r"model\.vision_model\.encoder\.layers\.\d+",
    parts=(
        ("head", r"lm_head(\..+)?"),
        ("projector", r"model\.connector(\..+)?"),
        ("vision", r"model\.vision_model(\..+)?"),
        ("language", r"model\.text_model(\..+)?"),
    ),
    image_placeholder=idefics3_media.IMAGE_TOKEN,
    image_token=idefics3_media.IMAGE_TOKEN,
    media_tokens=idefics3_media.MEDIA_TOKENS,
    target_size=idefics3_media.target_size,
    resize=idefics3_media.resize,
    image_layout=idefics3_media.image_layout,
    pixel_inputs=idefics3_media.pixel_inputs,
    token_inputs=idefics3_media.token_inputs,
    patches_per_token=idefics3_media.patches_per_token,
    # Its tower takes the tiles of all images as one batch.
    packing=Packing(language_model="model.text_model", tower_segments=False),
)
