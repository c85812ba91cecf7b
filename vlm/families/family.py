"""What the pipeline needs to know about one family of models: a frozen row of data and small functions.

Nothing here imports torch or transformers; the media functions of a row do so when they are called.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vlm.config.data import BoxConvention
from vlm.families.gguf import GgufLayout
from vlm.families.video import VideoInput

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

PartName = Literal["head", "projector", "vision", "language"]


@dataclass(frozen=True)
class MediaParts:
    """The pieces of a processor that a family's media functions work with.

    Attributes:
        image_processor: The transformers image processor (PIL backend).
        settings: Plain values of `processor_config.json`, such as a patch size kept there and not in the image processor.
        token_id: Gives the id of a token string.
    """

    image_processor: Any
    settings: Mapping[str, Any]
    token_id: Callable[[str], int]


@dataclass(frozen=True)
class Run:
    """The same media token `count` times in a row, within the text that stands for an image."""

    token: str
    count: int


# The text that stands for an image: literal text and runs of media tokens, in order.
ImageLayout = tuple["str | Run", ...]
# Images of a batch, one sequence per row of the batch: uint8 arrays of shape [height, width, 3].
RowImages = Sequence[Sequence["np.ndarray"]]


@dataclass(frozen=True, kw_only=True)
class PackedSamples:
    """What is known of the conversations that share one row.

    Attributes:
        parts: Processor pieces.
        samples: Ids of each, of shape [tokens].
        num_media: Images and videos of each.
        media: Pixel inputs of all of them, as those of one row.
        config: The model's `config.json`.
    """

    parts: MediaParts
    samples: Sequence[torch.Tensor]
    num_media: Sequence[int]
    media: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How several conversations of a family share one row. See `vlm.packing`.

    Attributes:
        language_model: Full name of the language model, which gets the boundaries of the samples.
        vision_tower: Full name of the vision tower, which gets the tower inputs.
        tower_segments: Whether the vision tower hands boundaries of images or windows to its attention as ends of segments;
            if not, it keeps its own attention.
        tower_inputs: Gives, for each call of the vision tower, arguments that it would else derive from the images' sizes by
            itself, image by image and with waits for the device; None for none.
        positions: Gives position ids of shape [axes, 1, tokens]; None for 0, 1, 2, … in every sample, of shape [1, tokens].
        row_inputs: Gives more entries of the packed row; None for none.
        language_inputs: `(model, packed row)` to more arguments of the language model's layers; None for none.
        install: Puts hooks on a live model and gives their handles; None for no hooks.
    """

    language_model: str = "model.language_model"
    vision_tower: str = "model.visual"
    tower_segments: bool
    tower_inputs: Callable[[PackedSamples], list[dict[str, Any]]] | None = None
    positions: Callable[[PackedSamples], torch.Tensor] | None = None
    row_inputs: Callable[[PackedSamples], dict[str, Any]] | None = None
    language_inputs: Callable[[Any, Mapping[str, Any]], dict[str, Any]] | None = None
    install: Callable[[Any], list[Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class CrossAttention:
    """Image features beside the text, and not in it, as far as they take memory.

    Attributes:
        layers: Numbers of the language model's layers that look at them.
        mask_values: Values of the vision tower's attention mask per position, where all of its layers share a dense one.
    """

    layers: tuple[int, ...]
    mask_values: int


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models. All patterns are regular expressions that must match a whole name.

    Attributes:
        model_type: Name in the family table.
        title: Name for people.
        architectures: Values of `architectures` in `config.json` that mean this family.
        config_types: Values of `model_type` in `config.json` that mean this family, where no architecture is given.
        vision_types: Values of `model_type` in the `vision_config` that mean this family, where neither of the above tells
            it from others; empty if they do.
        model_class: Class in transformers that loads a checkpoint of this family.
        image_processor_class: Class in transformers that prepares its images with Pillow alone.
        language_attention: Full names of the attention projections of the language model, cross-attention included.
        language_mlp: Full names of the feed-forward projections of the language model.
        vision_attention: Full names of the attention projections of all vision encoders.
        vision_mlp: Full names of the feed-forward projections of all vision encoders.
        projector: Full names of the linear layers between vision and language; None where there is no such layer but a
            bare weight, which cannot carry an adapter and is trained whole or not at all.
        language_expert_parameters: Full names of 3-D expert *parameters* (no modules), which LoRA and quantisation
            have to treat apart; None where the family has none.
        language_layer: Full names of the decoder layers.
        vision_layer: Full names of the vision encoders' layers.
        parts: Part names with the pattern of all module names in them; the first match counts.
        image_placeholder: What the chat template writes for an image, before it is expanded.
        image_token: The media token whose embedding is replaced by image features.
        media_tokens: All tokens around and for images and videos; none of them ever carries loss.
        target_size: `(parts, height, width, min_pixels, max_pixels)` to the (height, width) that an image is resized to.
        image_layout: `(parts, height, width)` of an image at its target size to the text that stands for it.
        pixel_inputs: `(parts, images of each row)` to the model's image tensors, and lists where the model takes those.
        video: How videos are taken; None for families that take none.
        token_inputs: `(parts, input_ids of shape [batch, sequence], pixel inputs)` to further tensors that the model
            needs beside the ids, such as token types or a cross-attention mask.
        resize: `(parts, RGB or grey image, target size)` to the image at that size; None for the image processor's filter alone.
        patches_per_token: A model's `config.json` to the positions in the vision tower behind each media token; None where
            these are merged squares of patches.
        cross_attention: A model's `config.json` to what its layers for image features are; None where features are tokens
            of the text.
        prepare_model: Called once with every live model, for what its batches need to be right; None for nothing.
        translate_config: Turns the content of a `config.json` that transformers has no class for into one of
            `model_class`; gets native ones too, and gives them back. None where all checkpoints are native.
        tokenizer_class: Class in transformers that opens `tokenizer.json`, where the one that checkpoints name is wrong.
        image_processor_defaults: Content of a `preprocessor_config.json` for checkpoints that have none.
        chat_template: Jinja source for checkpoints that have none.
        markup_tokens: Special tokens that belong in people's texts and in answers, such as marks around a box; all others
            stay plain characters there.
        cut_before_answers: Whether an answer is tokenised by itself, as generation does: for layouts in which nothing
            stands between a question and its answer, so that a token could reach over both.
        answer_end: The token that ends a generated answer, where the chat template writes none behind an answer but leaves
            it to the start of the next turn: encoding writes it behind the last answer, and it is learnt behind each.
            None where the template ends answers itself.
        box_convention: How answers of these models give coordinates: in pixels of the image at its target size
            (``"absolute"``), or relative to its sides, from 0 to 1, 999 or 1000.
        gguf: How llama.cpp names its parts; None where it does not run the family, or that is not written here.
        generation_defaults: Generation settings for checkpoints without `generation_config.json`.
        packing: How conversations share one row; None for a family that trains on padded batches.
    """

    model_type: str
    title: str
    architectures: tuple[str, ...]
    config_types: tuple[str, ...]
    vision_types: tuple[str, ...] = ()
    model_class: str
    image_processor_class: str
    language_attention: str
    language_mlp: str
    vision_attention: str
    vision_mlp: str
    projector: str | None
    language_expert_parameters: str | None = None
    language_layer: str
    vision_layer: str
    parts: tuple[tuple[PartName, str], ...]
    image_placeholder: str
    image_token: str
    media_tokens: tuple[str, ...]
    target_size: Callable[[MediaParts, int, int, int | None, int | None], tuple[int, int]]
    image_layout: Callable[[MediaParts, int, int], ImageLayout]
    pixel_inputs: Callable[[MediaParts, RowImages], dict[str, Any]]
    token_inputs: Callable[[MediaParts, torch.Tensor, Mapping[str, Any]], dict[str, torch.Tensor]]
    video: VideoInput | None = None
    resize: Callable[[MediaParts, Image.Image, tuple[int, int]], Image.Image] | None = None
    patches_per_token: Callable[[Mapping[str, Any]], int] | None = None
    cross_attention: Callable[[Mapping[str, Any]], CrossAttention] | None = None
    prepare_model: Callable[[Any], None] | None = None
    translate_config: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    tokenizer_class: str | None = None
    image_processor_defaults: Mapping[str, Any] | None = None
    chat_template: str | None = None
    markup_tokens: tuple[str, ...] = ()
    cut_before_answers: bool = False
    answer_end: str | None = None
    box_convention: BoxConvention = "normalized_1000"
    gguf: GgufLayout | None = None
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    packing: Packing | None = None

    def part_of(self, name: str) -> PartName | None:
        """The part that a module or parameter belongs to.

        Args:
            name: Full name, such as ``"model.visual.blocks.0.attn.qkv"``.

        Returns:
            The part, or None for a name outside all parts.
        """
        for part, pattern in _compiled(self.parts):
            if pattern.fullmatch(name):
                return part
        return None


@functools.cache
def _compiled(parts: tuple[tuple[PartName, str], ...]) -> tuple[tuple[PartName, re.Pattern[str]], ...]:
    return tuple((part, re.compile(pattern)) for part, pattern in parts)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's section of a `config.json`, or the whole of it where the file is flat."""
    for key in ("text_config", "language_config", "llm_config"):
        section = config.get(key)
        if isinstance(section, Mapping):
            return section
    return config


def context_length_tokens(config: Mapping[str, Any]) -> int | None:
    """Longest sequence that a model was made for, by its `config.json`; None where that does not say."""
    for section in (text_config(config), config):
        value = section.get("max_position_embeddings")
        if isinstance(value, int):
            return value
    return None
