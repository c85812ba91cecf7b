"""The processor of a notebook: the core's `Processing` with the call signature of transformers' processors.

Works without torchvision, which the stock processors of several families need even for still images. Loads transformers.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Image
from transformers import BatchFeature, ProcessorMixin

from vlm.data.video import Medium, resize, target_size, video_reference
from vlm.errors import ConfigError, DataError
from vlm.facade.hub import upload
from vlm.facade.images import load_medium
from vlm.facade.messages import split_messages
from vlm.facade.options import check_fixed

if TYPE_CHECKING:
    from vlm.families import Video
    from vlm.processing import Processing

_FIXED_CALL: dict[str, tuple[Any, str]] = {
    "add_special_tokens": (False, "the chat template writes all control tokens; leave it out"),
    "padding": (True, "rows of different lengths are always padded; leave it out"),
    "truncation": (False, "a conversation that was cut would lose image tokens; shorten the text or the images"),
    "max_length": (None, "a conversation that was cut would lose image tokens; shorten the text or the images"),
    "return_tensors": ("pt", "tensors are PyTorch's; use 'pt'"),
}


class VisionProcessor(ProcessorMixin):
    """Text with placeholders, images and videos to a model's inputs.

    A trainer takes it as ``processing_class``.

    Args:
        processing: The core's processor.

    Attributes:
        processing: The core's processor.
        tokenizer: The transformers tokenizer.
        image_processor: The transformers image processor.
        chat_template: Jinja source.
    """

    def __init__(self, processing: Processing) -> None:
        # Not the base class's own: it takes apart and checks what is whole and checked here.
        self.processing = processing
        self.tokenizer = processing.tokenizer
        self.image_processor = processing.image_processor
        self.chat_template = processing.chat_template

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        fps: float | Sequence[float] | None = None,
        padding_side: str = "left",
        **options: Any,
    ) -> BatchFeature:
        """Makes a model's inputs.

        Args:
            images: One image or a list: Pillow images, arrays, bytes, paths or ``data:`` URIs, in the order of their
                placeholders in all texts; or one list per text.
            text: Rendered by `apply_chat_template`, one or several.
            videos: A list of videos in the order of their placeholders in all texts, each a list of frames, an array of shape
                [frames, height, width, 3], a folder or an animated file. All frames that are given are taken.
            fps: Frames per second of the videos, one number or one per video; None takes the file's, or 2.
            padding_side: ``"left"``, as generation needs it, or ``"right"``.
            **options: Options of transformers' processors that only one value is possible for here.

        Returns:
            Tensors by the model's argument names; ``.to(device)`` moves them.

        Raises:
            ConfigError: An option would have no effect.
            DataError: Texts and images do not fit together, or an image cannot be used.
        """
        check_fixed("processor", options, _FIXED_CALL, ("images", "text", "videos", "fps", "padding_side"))
        if text is None:
            raise DataError("the processor got no text; render the conversation with apply_chat_template first")
        texts = [text] if isinstance(text, str) else list(text)
        films = _videos(videos, fps)
        pixels = [[self._resized(medium) for medium in row] for row in self._by_text(images, films, texts)]
        rows = [
            self.processing.encode_text(words, [medium.shape[:-1] for medium in own]).input_ids
            for words, own in zip(texts, pixels, strict=True)
        ]
        return BatchFeature(self._padded(rows, pixels, _side(padding_side)))

    def apply_chat_template(  # type: ignore[override]  # fewer options than the base class, each with an effect
        self,
        conversation: Any,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        padding_side: str = "left",
        **options: Any,
    ) -> Any:
        """Renders a conversation, and makes the model's inputs of it if asked to.

        Args:
            conversation: OpenAI-style messages, or a list of such conversations.
            add_generation_prompt: End with the start of an assistant turn.
            tokenize: Give the model's inputs, with the images of the messages, rather than text.
            return_dict: With `tokenize`, give all inputs rather than the ids alone.
            padding_side: As in a call.
            **options: Options of transformers' processors that only one value is possible for here.

        Returns:
            Text, or a list of texts; with `tokenize`, tensors by name, or the ids of shape [batch, sequence].

        Raises:
            DataError: The messages break a rule.
        """
        check_fixed("apply_chat_template", options, _FIXED_CALL, ("add_generation_prompt", "tokenize", "return_dict"))
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        split = [split_messages(one) for one in (conversation if several else [conversation])]
        if not tokenize:
            texts = [self.processing.render(messages, add_generation_prompt) for messages, _ in split]
            return texts if several else texts[0]
        if any(reference is None for _, references in split for reference in references):
            raise DataError(
                "an image part has no image, so there is nothing to make pixels of; put it into the part as"
                " {'type': 'image', 'image': …}, or render with tokenize=False and give images and text to the processor"
            )
        pixels = [
            [self._resized(load_medium(reference, allow_urls=False)) for reference in references]
            for _, references in split
        ]
        # From the messages rather than their text: control tokens that a person typed stay text this way.
        rows = [
            self.processing.encode(messages, [medium.shape[:-1] for medium in own], add_generation_prompt).input_ids
            for (messages, _), own in zip(split, pixels, strict=True)
        ]
        inputs = BatchFeature(self._padded(rows, pixels, _side(padding_side)))
        return inputs if return_dict else inputs["input_ids"]

    def decode(self, *args: Any, **options: Any) -> str:
        """Text of ids, by the tokenizer."""
        return str(self.tokenizer.decode(*args, **options))

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        """Texts of several rows of ids, by the tokenizer."""
        return list(self.tokenizer.batch_decode(*args, **options))

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **options: Any) -> None:
        """Writes the model's own processor files, which transformers' AutoProcessor and this project open.

        Args:
            save_directory: Made if it is not there.
            push_to_hub: False; call the method of that name instead.
            **options: None is known.
        """
        fixed = {"push_to_hub": (False, "call push_to_hub instead")}
        check_fixed("save_pretrained", {"push_to_hub": push_to_hub, **options}, fixed)
        self.processing.save(Path(save_directory))

    def push_to_hub(  # type: ignore[override]  # fewer options than the base class, each with an effect
        self,
        repo_id: str,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str = "Upload processor",
    ) -> str:
        """Uploads what `save_pretrained` writes.

        Args:
            repo_id: ``"user/name"`` on the Hub, made if it is not there.
            token: With write access; None takes the one of the login.
            private: Of a new repository.
            commit_message: Of the upload.

        Returns:
            The address of the upload.

        Raises:
            ExportError: The Hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo_id, token, private, commit_message)

    @property
    def model_input_names(self) -> list[str]:
        """What `generate` may be given."""
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    def __repr__(self) -> str:
        return f"VisionProcessor({self.processing.family.title})"

    def _resized(self, medium: Medium) -> np.ndarray | Video:
        return resize(self.processing, medium, target_size(self.processing, medium, None, None))

    def _by_text(self, images: Any, videos: Sequence[Medium], texts: Sequence[str]) -> list[list[Medium]]:
        """Images and videos of each text, in the order of their placeholders."""
        stills = [
            [load_medium(image, allow_urls=False) for image in row] for row in self._images_by_text(images, texts)
        ]
        family = self.processing.family
        if family.video is None:
            if videos:
                raise DataError(f"{self.processing.video_problem}, or give the frames as images")
            return stills
        count = sum(words.count(family.video.placeholder) for words in texts)
        if count != len(videos):
            raise DataError(
                f"the texts have {count} video placeholders ({family.video.placeholder!r}) but {len(videos)} videos came with"
                " them; give one video per placeholder"
            )
        pattern = re.compile(f"{re.escape(family.image_placeholder)}|{re.escape(family.video.placeholder)}")
        waiting = iter(videos)
        rows = []
        for words, own in zip(texts, stills, strict=True):
            left = list(own)
            row = []
            for placeholder in pattern.findall(words):
                if placeholder == family.video.placeholder:
                    row.append(next(waiting))
                elif left:
                    row.append(left.pop(0))
            rows.append(row + left)  # a wrong number is an error when the text is encoded
        return rows

    def _images_by_text(self, images: Any, texts: Sequence[str]) -> list[list[Any]]:
        """Images of each text."""
        if images is None:
            images = []
        elif not isinstance(images, list | tuple):
            images = [images]
        if images and isinstance(images[0], list | tuple):
            if len(images) != len(texts):
                raise DataError(
                    f"the processor got {len(texts)} texts and images for {len(images)}; give one list per text"
                )
            return [list(row) for row in images]
        placeholder = self.processing.family.image_placeholder
        counts = [words.count(placeholder) for words in texts]
        if sum(counts) != len(images):
            raise DataError(
                f"the texts have {sum(counts)} image placeholders ({placeholder!r}) but {len(images)} images came with them;"
                " give one image per placeholder"
            )
        waiting = iter(images)
        return [[next(waiting) for _ in range(count)] for count in counts]

    def _padded(
        self, rows: Sequence[Sequence[int]], pixels: Sequence[Sequence[np.ndarray | Video]], side: str
    ) -> dict[str, torch.Tensor]:
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), self.processing.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(length - len(row), length) if side == "left" else slice(len(row))
            ids[number, place] = torch.tensor(row)
            mask[number, place] = 1
        media = self.processing.pixel_inputs(pixels)
        return {"input_ids": ids, "attention_mask": mask, **self.processing.model_inputs(ids, media)}


def _videos(videos: Any, fps: Any) -> list[Medium]:
    """Videos as they come in a call, decoded."""
    if videos is None:
        return []
    first = videos[0] if isinstance(videos, list | tuple) and videos else None
    is_frame = isinstance(first, Image) or (isinstance(first, np.ndarray) and first.ndim < 4)
    is_one = is_frame or not isinstance(videos, list | tuple)
    videos = [videos] if is_one else list(videos)
    rates = list(fps) if isinstance(fps, list | tuple) else [fps] * len(videos)
    if len(rates) != len(videos):
        raise DataError(f"the processor got {len(videos)} videos and {len(rates)} values of fps; give one per video")
    references = [video_reference({"video": video, "fps": rate}) for video, rate in zip(videos, rates, strict=True)]
    if any(reference is None for reference in references):
        raise DataError(
            f"the processor got an empty video, or fps {fps!r} that is no positive number; give frames and a rate"
        )
    return [load_medium(reference, allow_urls=False, max_video_frames=sys.maxsize) for reference in references]


def _side(padding_side: str) -> str:
    if padding_side not in ("left", "right"):
        raise ConfigError(f"processor: padding_side {padding_side!r} is unknown; use 'left' or 'right'")
    return padding_side
