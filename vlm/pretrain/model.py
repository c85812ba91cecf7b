"""The model that is pretrained: Qwen2.5-VL's architecture with about eleven million weights. Loads torch and transformers.

Its tokenizer is all bytes: an answer is spelt, so that nothing is read that is not there letter by letter. Only the words
of prompts and roles are merged, which would otherwise be most of a short conversation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.builtin.model import (
    IMAGE_PROCESSOR,
    fill_with_noise,
    language_config,
    media_config,
    token_config,
    write_checkpoint,
)
from vlm.builtin.tokenizer import SPECIAL_TOKENS, build_tokenizer, train_merges
from vlm.config.pretrain import ArchitectureConfig
from vlm.loading.checkpoint import progress_where_seen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The first one is the built-in dataset's, and is asked most often.
PROMPTS = (
    "Transcribe the text in the image.",
    "Transcribe the text in this image.",
    "Read the text.",
    "What does the image say?",
    "What is written here?",
    "Transcribe this line.",
    "Write out what you see, line by line.",
)
MAIN_PROMPT_SHARE = 0.6
VOCAB_SIZE = 384
# Lines of text are enlarged to sixteen tokens at least, which makes nearly all of them two tokens high.
_SMALLEST_PIXELS = 16 * 28 * 28
PROCESSOR = {**IMAGE_PROCESSOR, "size": {"longest_edge": 256 * 28 * 28, "shortest_edge": _SMALLEST_PIXELS}}
_PROCESSOR_CLASS = "Qwen2_5_VLProcessor"
_HEAD_SIZE = 64
_MAX_SHARD_SIZE = "9MB"


def pretrain_tokenizer() -> Any:
    """The tokenizer: 256 bytes, the words of `PROMPTS` and of the roles, and the special tokens."""
    lines = [*PROMPTS, "user", "assistant", "system", "You are a helpful assistant."]
    return build_tokenizer(train_merges(lines, VOCAB_SIZE - len(SPECIAL_TOKENS)))


def new_model(architecture: ArchitectureConfig, seed: int) -> PreTrainedModel:
    """A model with seeded random weights in float32, in proportion to the width of what they add up.

    Args:
        architecture: Its sizes.
        seed: Of the weights.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = pretrain_tokenizer()
    vision = architecture.vision_width
    config = Qwen2_5_VLConfig(
        text_config={
            **language_config(
                hidden_size=architecture.language_width,
                intermediate_size=architecture.language_mlp_width,
                num_layers=architecture.language_layers,
                num_heads=architecture.language_width // _HEAD_SIZE,
                vocab_size=VOCAB_SIZE,
            ),
            **token_config(tokenizer),
        },
        vision_config={
            "depth": architecture.vision_layers,
            "hidden_size": vision,
            "intermediate_size": architecture.vision_mlp_width,
            "num_heads": vision // _HEAD_SIZE,
            "out_hidden_size": architecture.language_width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            # As in the published models, windows in most layers and the last layer over the whole image.
            "fullatt_block_indexes": [layer for layer in range(architecture.vision_layers) if layer % 2],
        },
        **media_config(tokenizer),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    # At these widths three times the usual 0.02, with which a toy took twice as many lines to read its first figures.
    fill_with_noise(model, seed)
    return model


@contextmanager
def patches_by_product(model: Any) -> Iterator[None]:
    """Embeds patches by a matrix product instead of a convolution whose steps are as long as its kernel.

    It is the same sum; but convolutions in three dimensions and 16 bit are very slow in some versions of the library that
    computes them on GPUs, and slower on CPUs.

    Args:
        model: The model, as before at the end of the block.
    """
    import torch

    embedding = model.base_model.visual.patch_embed

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(pixels, embedding.proj.weight.flatten(1))

    embedding.forward = forward
    try:
        yield
    finally:
        del embedding.forward


def write_model(model: PreTrainedModel, directory: Path) -> None:
    """Writes a checkpoint folder in the precision of the weights, in shards of at most 9 MB.

    Args:
        model: The model.
        directory: An existing folder.
    """
    with progress_where_seen():
        write_checkpoint(
            model,
            directory,
            processor_class=_PROCESSOR_CLASS,
            tokenizer=pretrain_tokenizer(),
            image_processor=PROCESSOR,
            max_shard_size=_MAX_SHARD_SIZE,
        )
