"""The toy `builtin-random`: Qwen2.5-VL's architecture at toy size with random weights, made on the fly.

It lets the whole pipeline run without a download; it knows nothing before it is trained. All widths are multiples of
64, the block size of NF4, and the vision tower has both window and full attention, so that every code path of the real
models is taken. torch and transformers are imported when it is made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.builtin.recipe import SEED
from vlm.builtin.tokenizer import VOCAB_SIZE, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT_LENGTH_TOKENS = 4096

IMAGE_PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "merge_size": 2,
    "patch_size": 14,
    "processor_class": "Qwen2_5_VLProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 256 * 28 * 28, "shortest_edge": 4 * 28 * 28},
    "temporal_patch_size": 2,
}
VIDEO_PROCESSOR = {**IMAGE_PROCESSOR, "video_processor_type": "Qwen2VLVideoProcessor"}
del VIDEO_PROCESSOR["image_processor_type"]


def language_config(
    *, hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, vocab_size: int = VOCAB_SIZE
) -> dict[str, Any]:
    """Language-model section of a small Qwen2-VL or Qwen2.5-VL config over the built-in tokenizer."""
    half_head = hidden_size // num_heads // 2
    side = half_head * 3 // 8  # as in the real models, 2 : 3 : 3 of the rotary frequencies for time, height and width
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads // 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": CONTEXT_LENGTH_TOKENS,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [half_head - 2 * side, side, side],
        },
    }


def token_config(tokenizer: Any = None) -> dict[str, Any]:
    """The special token ids that a config of a tokenizer (the built-in model's, if not given) has to name."""
    tokenizer = tokenizer or build_tokenizer()
    return {
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


def media_config(tokenizer: Any = None) -> dict[str, Any]:
    """The media token ids that a config of a tokenizer (the built-in model's, if not given) has to name."""
    tokenizer = tokenizer or build_tokenizer()
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def fill_with_noise(model: PreTrainedModel, seed: int) -> None:
    """Gives every parameter seeded values: noise scaled by 1 / sqrt(fan-in) for matrices, ones for norms, zeros for biases.

    The stream is numpy's legacy one, which is frozen for all versions, so the bytes depend on no torch version.
    """
    import numpy as np
    import torch

    noise = np.random.RandomState(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            fan_in = parameter[0].numel()
            scale = 0.5 if id(parameter) in embeddings else 1 / math.sqrt(fan_in)
            values = noise.standard_normal(tuple(parameter.shape)).astype(np.float32) * np.float32(scale)
            parameter.copy_(torch.from_numpy(values))


def write_checkpoint(
    model: PreTrainedModel,
    directory: Path,
    *,
    processor_class: str,
    tokenizer: Any = None,
    image_processor: Mapping[str, Any] = IMAGE_PROCESSOR,
    max_shard_size: str = "4GB",
) -> None:
    """Writes model, tokenizer and processor files as a checkpoint folder on the Hub has them.

    Args:
        model: The model.
        directory: An existing folder.
        processor_class: Name of the processor's class in transformers.
        tokenizer: None for the built-in model's.
        image_processor: Settings of the image processor.
        max_shard_size: Largest weight file.
    """
    from transformers import GenerationConfig

    end_of_turn, pad = model.config.text_config.eos_token_id, model.config.text_config.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=[end_of_turn, pad], pad_token_id=pad)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    (tokenizer or build_tokenizer()).save_pretrained(directory)
    video_processor = {**image_processor, "video_processor_type": VIDEO_PROCESSOR["video_processor_type"]}
    del video_processor["image_processor_type"]
    for name, content in (
        ("preprocessor_config.json", image_processor),
        ("video_preprocessor_config.json", video_processor),
    ):
        text = json.dumps({**content, "processor_class": processor_class}, indent=2, sort_keys=True)
        (directory / name).write_text(text + "\n", encoding="utf-8")


def make_builtin_checkpoint(directory: Path) -> Path:
    """Writes the built-in model (float32, about 1.6 million parameters) as a checkpoint folder.

    Args:
        directory: An existing, empty folder.

    Returns:
        The folder.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            **language_config(hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4),
            **token_config(),
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
        },
        **media_config(),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    fill_with_noise(model, SEED)
    write_checkpoint(model, directory, processor_class="Qwen2_5_VLProcessor")
    return directory
