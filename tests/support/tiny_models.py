"""Tiny random checkpoints of every family, as folders laid out like those on the Hub, and conversations to feed them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.stock_processors import without_video
from tests.support.tiny_deepseek_ocr import DEEPSEEK_OCR, DEEPSEEK_OCR2
from tests.support.tiny_family import TinyFamily, names
from tests.support.tiny_gemma3 import GEMMA3
from tests.support.tiny_glm_ocr import GLM_OCR
from tests.support.tiny_idefics3 import IDEFICS3, SMOLVLM
from tests.support.tiny_internvl import INTERNVL
from tests.support.tiny_lighton_ocr import LIGHTON_OCR
from tests.support.tiny_mistral import MISTRAL3, PIXTRAL
from tests.support.tiny_mllama import MLLAMA
from tests.support.tiny_paddleocr_vl import PADDLEOCR_VL
from tests.support.tiny_qwen3_vl import QWEN3_VL
from vlm.builtin.model import fill_with_noise, language_config, media_config, token_config, write_checkpoint
from vlm.families import FAMILIES

_LANGUAGE = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2}
_VISION = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}


def make_tiny_checkpoint(model_type: str, dir: Path, seed: int = 0, *, tie_word_embeddings: bool = False) -> Path:
    """Writes a float32 checkpoint of under a million parameters.

    Args:
        model_type: Name in the family table.
        dir: Folder, made if need be.
        seed: Of the weights.
        tie_word_embeddings: Share the head's weights with the embeddings, as the small real models do.

    Returns:
        The folder: config, safetensors, tokenizer, chat template, image and video processor files.
    """
    dir.mkdir(parents=True, exist_ok=True)
    family = TINY[model_type]
    model = family.build(tie_word_embeddings)
    fill_with_noise(model, seed)
    family.write(model, dir)
    return dir


def is_available(model_type: str) -> bool:
    """Whether the installed transformers has the family; the oldest that the project works with lacks the newest ones."""
    import transformers

    return hasattr(transformers, FAMILIES[model_type].model_class)


def _qwen2_vl(tie: bool) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {**_VISION, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
    text = {**language_config(**_LANGUAGE), **token_config()}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie, **media_config())
    )


def _qwen2_5_vl(tie: bool) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        **_VISION,
        "hidden_size": 64,
        "intermediate_size": 128,
        "out_hidden_size": 64,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    text = {**language_config(**_LANGUAGE), **token_config()}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie, **media_config())
    )


def _qwen(build: Callable[[bool], Any], processor_class: str, vision_mlp: tuple[str, ...]) -> TinyFamily:
    return TinyFamily(
        build=build,
        write=partial(write_checkpoint, processor_class=processor_class),
        processor_class=processor_class,
        stock_processor=partial(without_video, processor_class, "Qwen2VLImageProcessorPil"),
        answer_start="<|im_start|>assistant\n",
        end_of_turn="<|im_end|>",
        pad_token="<|endoftext|>",
        image_tokens=("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
        language_attention=names(
            "model.language_model.layers.{}.self_attn.", 2, ("q_proj", "k_proj", "v_proj", "o_proj")
        ),
        language_mlp=names("model.language_model.layers.{}.mlp.", 2, ("gate_proj", "up_proj", "down_proj")),
        vision_attention=names("model.visual.blocks.{}.attn.", 2, ("qkv", "proj")),
        vision_mlp=names("model.visual.blocks.{}.mlp.", 2, vision_mlp),
        projector=("model.visual.merger.mlp.0", "model.visual.merger.mlp.2"),
        language_layers=("model.language_model.layers.0", "model.language_model.layers.1"),
        vision_layers=("model.visual.blocks.0", "model.visual.blocks.1"),
    )


TINY: dict[str, TinyFamily] = {
    "qwen2_vl": _qwen(_qwen2_vl, "Qwen2VLProcessor", ("fc1", "fc2")),
    "qwen2_5_vl": _qwen(_qwen2_5_vl, "Qwen2_5_VLProcessor", ("gate_proj", "up_proj", "down_proj")),
    "mllama": MLLAMA,
    "pixtral": PIXTRAL,
    "mistral3": MISTRAL3,
    "deepseek_ocr": DEEPSEEK_OCR,
    "deepseek_ocr2": DEEPSEEK_OCR2,
    "qwen3_vl": QWEN3_VL,
    "glm_ocr": GLM_OCR,
    "internvl": INTERNVL,
    "gemma3": GEMMA3,
    "idefics3": IDEFICS3,
    "smolvlm": SMOLVLM,
    "paddleocr_vl": PADDLEOCR_VL,
    "lighton_ocr": LIGHTON_OCR,
}
TINY_FAMILIES = tuple(TINY)
# One of each kind, for what does not turn on a family's details: windows and positions in three axes, cross-attention,
# one row of patches, tiles, experts under converted names, and padded batches with a bare weight as projector.
UNLIKE_FAMILIES = ("qwen2_5_vl", "mllama", "pixtral", "smolvlm", "deepseek_ocr", "gemma3")


def tiny_image(height: int = 56, width: int = 84, seed: int = 0) -> np.ndarray:
    """Random uint8 image of shape [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tiny_conversation(
    answer: str = "Total 12.50", image_sizes: tuple[tuple[int, int], ...] = ((56, 84),), seed: int = 0
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """One question about images, and its answer.

    Args:
        answer: The assistant's words.
        image_sizes: Height and width of each image; multiples of 28 with an area within the processor's limits are
            target sizes already.
        seed: Of the pixels.

    Returns:
        Messages as in a prepared dataset (image parts without pixels), and the images.
    """
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in image_sizes]
    parts.append({"type": "text", "text": "Transcribe the text in the image."})
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return messages, [tiny_image(height, width, seed + index) for index, (height, width) in enumerate(image_sizes)]


def fitted(processing: Any, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Images as data preparation leaves them: most tiny models take the tests' sizes as they are, some have one size only.

    Args:
        processing: A `vlm.processing.Processing`.
        images: uint8 arrays of shape [height, width, 3].
    """
    from PIL import Image

    return [
        processing.resize_image(Image.fromarray(image), processing.target_size(*image.shape[:2])) for image in images
    ]
