"""DeepSeek-OCR: SAM and CLIP one behind the other, and a mixture-of-experts decoder."""

from __future__ import annotations

from functools import partial

from vlm.families import deepseek_config, deepseek_media
from vlm.families.family import Family, Packing

DEEPSEEK_OCR = Family(
    model_type="deepseek_ocr",
    title="DeepSeek-OCR",
    # The second one is what a checkpoint of the first becomes when transformers saves it.
    architectures=("DeepseekOCRForCausalLM", deepseek_config.NATIVE_ARCHITECTURE),
    # Not "deepseek_vl_v2", which the published file says: two other networks say so too.
    config_types=(deepseek_config.NATIVE_TYPE,),
    model_class=deepseek_config.NATIVE_ARCHITECTURE,
    image_processor_class="DeepseekOcr2ImageProcessorPil",
    language_attention=r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    language_mlp=r"model\.language_model\.layers\.\d+\.mlp\.(shared_experts\.)?(gate|up|down)_proj",
    vision_attention=(
        r"model\.vision_tower\.(sam_encoder\.layers\.\d+\.attn\.(qkv|proj)"
        r"|vision_encoder\.encoder\.layers\.\d+\.self_attn\.([qkv]|out)_proj)"
    ),
    vision_mlp=(
        r"model\.vision_tower\.(sam_encoder\.layers\.\d+\.mlp\.lin[12]|vision_encoder\.encoder\.layers\.\d+\.mlp\.fc[12])"
    ),
    projector=r"model\.multi_modal_projector",
    language_expert_parameters=r"model\.language_model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj",
    language_layer=r"model\.language_model\.layers\.\d+",
    vision_layer=r"model\.vision_tower\.(sam_encoder|vision_encoder\.encoder)\.layers\.\d+",
    parts=(
        ("head", r"lm_head(\..+)?"),
        ("projector", r"model\.(multi_modal_projector(\..+)?|view_separator|image_newline)"),
        ("vision", r"model\.vision_tower(\..+)?"),
        ("language", r"model\.language_model(\..+)?"),
    ),
    image_placeholder=deepseek_media.IMAGE_TOKEN,
    image_token=deepseek_media.IMAGE_TOKEN,
    media_tokens=deepseek_media.MEDIA_TOKENS,
    target_size=deepseek_media.target_size,
    image_layout=deepseek_media.rows_with_breaks_layout,
    pixel_inputs=partial(deepseek_media.pixel_inputs, with_grids=True, global_view=deepseek_media.padded_like_pillow),
    token_inputs=deepseek_media.token_inputs,
    prepare_model=deepseek_media.cast_pixels,
    translate_config=deepseek_config.translate,
    tokenizer_class="PreTrainedTokenizerFast",
    # The sizes that the publishers call "Gundam", and their limits on the number of crops.
    image_processor_defaults={
        "background_color": [127, 127, 127],
        "crop_to_patches": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "UnlimitedOcrImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_patches": 9,
        "min_patches": 2,
        "processor_class": "UnlimitedOcrProcessor",
        "size": {"height": 1024, "width": 1024},
        "tile_size": 640,
    },
    chat_template=deepseek_media.PLAIN_CHAT_TEMPLATE,
    markup_tokens=deepseek_media.MARKUP_TOKENS,
    box_convention="normalized_999",
    cut_before_answers=True,
    # The publishers' own setting: without it, long answers of the untuned model can run in circles.
    generation_defaults={"no_repeat_ngram_size": 20},
    # Its towers take pages and crops of all samples as one batch each.
    packing=Packing(tower_segments=False),
)
