"""Llama 3.2 Vision (mllama): images are looked at through cross-attention layers and take one token in the text."""

from __future__ import annotations

from vlm.families import mllama_media, mllama_packing, mllama_rows
from vlm.families.family import Family, Packing

_VISION_LAYER = r"model\.vision_model\.(global_)?transformer\.layers\.\d+"

MLLAMA = Family(
    model_type="mllama",
    title="Llama 3.2 Vision",
    architectures=("MllamaForConditionalGeneration",),
    config_types=("mllama",),
    model_class="MllamaForConditionalGeneration",
    image_processor_class="MllamaImageProcessorPil",
    language_attention=r"model\.language_model\.layers\.\d+\.(self|cross)_attn\.[qkvo]_proj",
    language_mlp=r"model\.language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    vision_attention=_VISION_LAYER + r"\.self_attn\.[qkvo]_proj",
    vision_mlp=_VISION_LAYER + r"\.mlp\.fc[12]",
    projector=r"model\.multi_modal_projector",
    language_layer=r"model\.language_model\.layers\.\d+",
    vision_layer=_VISION_LAYER,
    parts=(
        ("head", r"lm_head(\..+)?"),
        ("projector", r"model\.multi_modal_projector(\..+)?"),
        ("vision", r"model\.vision_model(\..+)?"),
        ("language", r"model\.language_model(\..+)?"),
    ),
    image_placeholder=mllama_media.IMAGE_TOKEN,
    image_token=mllama_media.IMAGE_TOKEN,
    media_tokens=(mllama_media.IMAGE_TOKEN,),
    target_size=mllama_media.target_size,
    resize=mllama_media.resize,
    image_layout=mllama_media.image_layout,
    pixel_inputs=mllama_media.pixel_inputs,
    token_inputs=mllama_media.token_inputs,
    patches_per_token=mllama_media.patches_per_token,
    cross_attention=mllama_media.cross_attention,
    prepare_model=mllama_rows.keep_rows_apart,
    packing=Packing(
        # Its tower takes images apart as a batch of tiles.
        tower_segments=False,
        row_inputs=mllama_packing.row_inputs,
        language_inputs=mllama_packing.language_inputs,
        install=mllama_packing.install,
    ),
)
