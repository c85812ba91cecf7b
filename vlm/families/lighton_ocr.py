"""LightOnOCR: Pixtral's tower and a projector that merges squares of patches, before a small Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from vlm.families import lighton_media, pixtral_media, pixtral_packing
from vlm.families.family import Family, Packing

_MODEL_TYPE = "lighton_ocr"


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Names a checkpoint's type, which some say is Mistral 3's for the sake of servers that know only that.

    Args:
        config: Content of the checkpoint's `config.json`.

    Returns:
        The same with this family's type and its name for the image token's id.
    """
    translated = {**config, "model_type": _MODEL_TYPE}
    if "image_token_index" in translated:
        translated["image_token_id"] = translated.pop("image_token_index")
    return translated


LIGHTON_OCR = Family(
    model_type=_MODEL_TYPE,
    title="LightOnOCR",
    # The second one is written in files made before transformers had the class.
    architectures=("LightOnOcrForConditionalGeneration", "LightOnOCRForConditionalGeneration"),
    config_types=(_MODEL_TYPE,),
    model_class="LightOnOcrForConditionalGeneration",
    image_processor_class="PixtralImageProcessorPil",
    language_attention=r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    language_mlp=r"model\.language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    vision_attention=r"model\.vision_encoder\.transformer\.layers\.\d+\.attention\.[qkvo]_proj",
    vision_mlp=r"model\.vision_encoder\.transformer\.layers\.\d+\.feed_forward\.(gate|up|down)_proj",
    projector=r"model\.vision_projection\.(linear_[12]|patch_merger\.merging_layer)",
    language_layer=r"model\.language_model\.layers\.\d+",
    vision_layer=r"model\.vision_encoder\.transformer\.layers\.\d+",
    parts=(
        ("head", r"lm_head(\..+)?"),
        ("projector", r"model\.vision_projection(\..+)?"),
        ("vision", r"model\.vision_encoder(\..+)?"),
        ("language", r"model\.language_model(\..+)?"),
    ),
    image_placeholder=lighton_media.IMAGE_TOKEN,
    image_token=lighton_media.IMAGE_TOKEN,
    media_tokens=lighton_media.MEDIA_TOKENS,
    target_size=lighton_media.target_size,
    image_layout=lighton_media.image_layout,
    pixel_inputs=lighton_media.pixel_inputs,
    token_inputs=pixtral_media.token_inputs,
    translate_config=translate,
    packing=Packing(tower_segments=True, install=partial(pixtral_packing.install, tower_name="model.vision_encoder")),
)
