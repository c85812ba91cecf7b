"""``VisionDataCollator``: conversations with images to batches, on the fly, for a bare TRL ``SFTTrainer``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError

from vlm.config import BoxConfig
from vlm.data.boxes import BoxWriter, ResizedImage
from vlm.data.prepared import PreparedRow
from vlm.data.rows import RowError
from vlm.data.video import resize, target_size
from vlm.errors import ConfigError, DataError
from vlm.facade.images import load_medium
from vlm.facade.messages import training_conversation
from vlm.facade.resizing import Resizing
from vlm.facade.state import state_of
from vlm.processing import Processing
from vlm.training.collator import IGNORED
from vlm.training.collator import VisionDataCollator as CoreCollator

_WORDS = "@@@"
_QUESTION: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": _WORDS}]}]


class VisionDataCollator:
    """Turns rows with OpenAI-style messages into batches. Also usable in a loader's worker processes.

    Args:
        model: What `FastVisionModel` gave.
        processor: The processor that came with it.
        max_seq_length: Longest conversation in tokens; longer ones lose the end of their answer, which is warned of once,
            and never an image token, which is an error. None takes the model's.
        formatting_func: Turns a row of the dataset into a row with ``messages``.
        resize: Before the model's own limits: ``"max"`` leaves images as they are; ``"min"`` shrinks them to the model's
            image size (512 for models that take any); a number is that size; a pair is an exact (width, height).
        ignore_index: -100, which is what the trainer leaves out.
        train_on_responses_only: Put loss on the assistant's words only, with the token that ends its turn.
        instruction_part: What the chat template writes before a user's words. Where the words are is found from the
            template; parts that are given are checked against it, since parts of another model would train on nothing.
        response_part: What the chat template writes before the assistant's words.
        force_match: Compare the parts with their white space.
        num_proc: None; a loader's workers decode images (``dataloader_num_workers`` of the trainer).
        completion_only_loss: True: padding and image tokens never carry loss.
        pad_to_multiple_of: Makes the length of every batch a multiple of this.
        resize_dimension: Which side `resize` is about: 0 the width, 1 the height, ``"max"`` or ``"min"`` of both.
        snap_to_patch_size: Either value: images always end on whole patches here.
        allow_urls: Fetch images that rows name by a remote address.
        boxes: Settings of `vlm.config.BoxConfig`, such as ``{"source": "absolute"}``: coordinates in the texts then follow
            their image when it is resized.
        max_video_frames: Of longer videos, evenly spaced frames are taken; None takes the default of `data`.

    Raises:
        ConfigError: An option is unknown or would have no effect, or a part is not what the template writes.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_seq_length: int | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        resize: Any = "max",
        ignore_index: int = IGNORED,
        train_on_responses_only: bool = False,
        instruction_part: str | None = None,
        response_part: str | None = None,
        force_match: bool = True,
        num_proc: int | None = None,
        completion_only_loss: bool = True,
        pad_to_multiple_of: int | None = None,
        resize_dimension: Any = 0,
        snap_to_patch_size: bool = False,
        allow_urls: bool = False,
        boxes: Mapping[str, Any] | None = None,
        max_video_frames: int | None = None,
    ) -> None:
        state = state_of(model)
        self.processing: Processing = state.loaded.processing
        if processor is not None and getattr(processor, "processing", None) is not self.processing:
            raise ConfigError(
                f"the given {type(processor).__name__} is not the processor that came with this model; give the one from"
                " FastVisionModel.from_pretrained"
            )
        for name, value, possible, remedy in (
            ("ignore_index", ignore_index, IGNORED, "the trainer leaves out that label only"),
            ("num_proc", num_proc, None, "set dataloader_num_workers of the trainer"),
            ("completion_only_loss", completion_only_loss, True, "padding and image tokens are nothing to learn"),
        ):
            if value != possible:
                raise ConfigError(
                    f"VisionDataCollator: {name}={value!r} cannot be; {remedy}, so leave it at {possible!r}"
                )
        for name, number in (("pad_to_multiple_of", pad_to_multiple_of), ("max_video_frames", max_video_frames)):
            if number is not None and number < 1:
                raise ConfigError(f"VisionDataCollator: {name} {number} must be positive or None")
        if (instruction_part or response_part) and not train_on_responses_only:
            raise ConfigError(
                "VisionDataCollator: instruction_part and response_part have no effect without train_on_responses_only=True;"
                " set that, or leave them out"
            )
        self._check_parts(instruction_part, response_part, exact=force_match)
        self.max_seq_length = state.max_seq_length if max_seq_length is None else max_seq_length
        self.formatting_func = formatting_func
        self.allow_urls = allow_urls
        self.max_video_frames = max_video_frames
        self._resizing = Resizing(resize, resize_dimension, state.loaded.model.config.to_dict())
        self._boxes = BoxWriter(_box_settings(boxes or {}), self.processing.box_convention)
        self._media = self.processing.media_token_ids
        self._warned = False
        self._collate = CoreCollator(
            self.processing,
            train_on_prompts=not train_on_responses_only,
            pad_to_multiple_of=pad_to_multiple_of or 1,
        )

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Collates.

        Args:
            rows: ``{"messages": […]}`` each, with images inside the messages as ``{"type": "image", "image": …}``, or
                beside them under ``"images"``, and videos as ``{"type": "video", "video": …}``; or just messages.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` of shape [batch, sequence], and the model's image tensors.

        Raises:
            DataError: A conversation breaks a rule, an image cannot be used, or what is too long cannot be cut.
        """
        return self._collate([self._prepare(row) for row in rows])

    def _prepare(self, row: Any) -> PreparedRow:
        if self.formatting_func is not None:
            row = self.formatting_func(row)
        messages, references = training_conversation(row)
        sources = [
            load_medium(reference, allow_urls=self.allow_urls, max_video_frames=self.max_video_frames)
            for reference in references
        ]
        media = [replace(medium, frames=[self._resizing(frame) for frame in medium.frames]) for medium in sources]
        sizes = [target_size(self.processing, medium, None, None) for medium in media]
        resized = [
            ResizedImage((medium.height, medium.width), (size[-2], size[-1]))
            for medium, size in zip(sources, sizes, strict=True)
        ]
        try:
            messages, _ = self._boxes(messages, resized)
        except RowError as error:
            raise DataError(f"a conversation cannot be trained on: {error.message}") from error
        encoded = self.processing.encode(messages, sizes)
        ids, spans = self._cut(encoded.input_ids, encoded.assistant_spans)
        pixels = [resize(self.processing, medium, size) for medium, size in zip(media, sizes, strict=True)]
        return PreparedRow(
            id="",
            group=None,
            messages=messages,
            images=pixels,
            input_ids=ids,
            assistant_spans=spans,
            target="",
            metadata={},
        )

    def _cut(self, ids: list[int], spans: list[tuple[int, int]]) -> tuple[Any, list[tuple[int, int]]]:
        import numpy as np

        limit = self.max_seq_length
        if limit is not None and len(ids) > limit:
            remedy = "raise max_seq_length, or make images smaller with resize"
            if not self._media.isdisjoint(ids[limit:]):
                raise DataError(
                    f"a conversation has {len(ids)} tokens, and max_seq_length {limit} would cut image tokens off; {remedy}"
                )
            spans = [(start, min(end, limit)) for start, end in spans if start < limit]
            if not spans:
                raise DataError(
                    f"a conversation has {len(ids)} tokens, and max_seq_length {limit} would cut off all that the assistant"
                    f" says; {remedy}"
                )
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"a conversation of {len(ids)} tokens is cut to max_seq_length {limit}, so its answer loses its end"
                    f" (said once, for all such rows); {remedy}",
                    stacklevel=4,
                )
            ids = ids[:limit]
        return np.asarray(ids, np.int32), spans

    def _check_parts(self, instruction: str | None, response: str | None, *, exact: bool) -> None:
        before_answer = self.processing.render(_QUESTION, add_generation_prompt=True)
        before_words = before_answer[: before_answer.rindex(_WORDS)]
        for name, part, written in (
            ("instruction_part", instruction, before_words),
            ("response_part", response, before_answer),
        ):
            if part is None:
                continue
            fits = written.endswith(part) if exact else written.rstrip().endswith(part.strip())
            if not part.strip() or not fits:
                raise ConfigError(
                    f"VisionDataCollator: {name} {part!r} is not what this model's chat template writes there, which ends"
                    f" with {written[-60:]!r}; use that, or leave it out: the template alone tells where the words are"
                )


def _box_settings(boxes: Mapping[str, Any]) -> BoxConfig:
    try:
        return BoxConfig(**boxes)
    except ValidationError as error:
        raise ConfigError(f"VisionDataCollator: boxes={dict(boxes)!r} cannot be: {error.errors()[0]['msg']}") from error
