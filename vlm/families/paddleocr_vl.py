"""PaddleOCR-VL: a SigLIP tower at native resolution before a small ERNIE 4.5 with positions on three axes."""

from __future__ import annotations

from functools import partial

from vlm.families import paddleocr_media, qwen_packing
from vlm.families.family import Family, Packing

_VISION_LAYER = r"model\.visual\.vision_model\.encoder\.layers\.\d+"

PADDLEOCR_VL = Family(
    model_type="paddleocr_vl",
    title="PaddleOCR-VL",
    architectures=("PaddleOCRVLForConditionalGeneration",),
    config_types=("paddleocr_vl",),
    model_class="PaddleOCRVLForConditionalGeneration",
    image_processor_class="PaddleOCRVLImageProcessorPil",
    language_attention=r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    language_mlp=r"model\.language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    vision_attention=_VISION_LAYER + r"\.self_attn\.([qkv]|out)_proj",
    vision_mlp=_VISION_LAYER + r"\.mlp\.fc[12]",
    projector=r"model\.projector\.linear_[12]",
    language_layer=r"model\.language_model\.layers\.\d+",
    vision_layer=_VISION_LAYER,
    parts=(
        ("head", r"lm_head(\..+)?"),
        ("projector", r"model\.projector(\..+)?"),
        ("vision", r"model\.visual(\..+)?"),
        ("language", r"model\.language_model(\..+)?"),
    ),
    image_placeholder=paddleocr_media.IMAGE_TOKEN,
    image_token=paddleocr_media.IMAGE_TOKEN,
    media_tokens=paddleocr_media.MEDIA_TOKENS,
    target_size=paddleocr_media.target_size,
    image_layout=paddleocr_media.image_layout,
    pixel_inputs=paddleocr_media.pixel_inputs,
    token_inputs=paddleocr_media.token_inputs,
    # Checkpoints name Llama's, which would cut text in another way than the tokenizer.json beside it.
    tokenizer_class="PreTrainedTokenizerFast",
    packing=Packing(
        tower_segments=True,
        positions=partial(qwen_packing.positions, image_token=paddleocr_media.IMAGE_TOKEN, video_token=None),
    ),
)
