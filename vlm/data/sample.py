"""Rows from references to finished samples: decode, measure, shrink if they must be, resize once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlm.config.data import BoxConvention, DataConfig
from vlm.data.boxes import BoxWriter, ResizedImage
from vlm.data.images import ImageFolder, load_image_bytes, open_image, upright_image
from vlm.data.mapping import Columns, map_row, row_name
from vlm.data.rows import MappedRow, Note, Outcome, Row, RowError, Sample, UnreadableRow
from vlm.data.video import (
    MAX_IMAGES_OF_ROW,
    Medium,
    MediumSize,
    VideoReference,
    check_total,
    frames_as_images,
    load_video,
    resize,
    target_size,
)
from vlm.errors import ModelError
from vlm.families.video import Video

# Below this an image shows nothing that can be read, so shrinking further would only hide that the row does not fit.
SMALLEST_SHRUNK_PIXELS = 56 * 56
# Characters; no vocabulary has a longer one. Tokenising hundreds of megabytes, to find them too long, takes gigabytes.
_LONGEST_TOKEN = 1024
# Decoded pixels that wait together for the next stage, beside the row that goes over it.
_PIXELS_AT_A_TIME = 1 << 20


class EncodedConversation(Protocol):
    """Exact tokens of a conversation."""

    @property
    def input_ids(self) -> Sequence[int]:
        """Token ids, image placeholders included."""

    @property
    def assistant_spans(self) -> Sequence[tuple[int, int]]:
        """Half-open token ranges that carry loss."""

    @property
    def num_visual_tokens(self) -> int:
        """Number of image tokens."""


class ConversationEncoder(Protocol):
    """What preparation needs of a model's processing; every method must be safe to call from several threads at once."""

    @property
    def context_length_tokens(self) -> int | None:
        """Longest sequence the model takes, or None."""

    @property
    def box_convention(self) -> BoxConvention:
        """How the model gives coordinates in answers."""

    @property
    def video_problem(self) -> str | None:
        """Why the model takes no videos, and what does; None if it takes them."""

    def target_size(
        self, height: int, width: int, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> tuple[int, int]:
        """Size in pixels, (height, width), that the model sees an image at."""

    def resize_image(self, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """Pixels of shape [height, width, 3], uint8, resized with the model's own filter."""

    def encode(
        self, messages: list[dict[str, Any]], image_sizes: list[MediumSize], add_generation_prompt: bool = False
    ) -> EncodedConversation:
        """Tokens of a conversation whose images (height, width) and videos (frames, height, width) have these sizes."""


@dataclass(frozen=True)
class Job:
    """One row to prepare."""

    stream: int
    row_number: int
    row: Row | UnreadableRow
    columns: Columns
    folder: ImageFolder | None


@dataclass(frozen=True)
class _Opened:
    """A row with its images and videos decoded and their target sizes."""

    mapped: MappedRow
    media: list[Medium]
    sizes: list[MediumSize]


@dataclass(frozen=True)
class _Fitted:
    """A conversation with its images and videos at certain sizes."""

    sizes: list[MediumSize]
    messages: list[dict[str, Any]]
    encoded: EncodedConversation
    num_clipped: int


class SampleMaker:
    """Prepares rows; safe to call from several threads at once."""

    def __init__(self, data: DataConfig, processing: ConversationEncoder) -> None:
        self._data = data
        self._processing = processing
        self._boxes = BoxWriter(data.boxes, processing.box_convention)
        limits = [limit for limit in (data.max_length_tokens, processing.context_length_tokens) if limit is not None]
        self.limit_tokens: int | None = min(limits) if limits else None

    def __call__(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Prepares rows; what is wrong with one comes back as its outcome.

        Small rows take each stage together: its code then stays in the processor's caches, which saves a tenth of their time.
        """
        outcomes: list[Outcome | None] = [None] * len(jobs)
        waiting: list[tuple[int, _Opened]] = []
        num_pixels = 0
        for index, job in enumerate(jobs):
            opened = self._open(job)
            if isinstance(opened, Outcome):
                outcomes[index] = opened
                continue
            waiting.append((index, opened))
            num_pixels += sum(medium.width * medium.height * len(medium.frames) for medium in opened.media)
            if num_pixels >= _PIXELS_AT_A_TIME:
                self._finish(waiting, outcomes)
                waiting, num_pixels = [], 0
        self._finish(waiting, outcomes)
        return [outcome for outcome in outcomes if outcome is not None]

    def _open(self, job: Job) -> _Opened | Outcome:
        if isinstance(job.row, UnreadableRow):
            return Outcome(error=RowError(job.row.reason, job.row.message))
        row_id = None
        try:
            row_id = row_name(job.row, job.columns)
            mapped = map_row(job.row, job.columns, self._data)
            media: list[Medium] = []
            pixels_left = MAX_IMAGES_OF_ROW * self._data.max_source_pixels
            for reference in mapped.images:
                media.append(self._medium(reference, job.folder, pixels_left))
                pixels_left -= media[-1].width * media[-1].height * len(media[-1].frames)
            if self._data.video_as_images and any(medium.frames_per_second is not None for medium in media):
                messages, media = frames_as_images(mapped.messages, media)
                mapped = replace(mapped, messages=messages)
            return _Opened(mapped, media, self._target_sizes(media, self._data.max_pixels))
        except RowError as error:
            return Outcome(id=row_id, error=error)

    def _medium(self, reference: Any, folder: ImageFolder | None, pixels_left: int) -> Medium:
        load = partial(load_image_bytes, folder=folder, allow_urls=self._data.allow_urls)
        if not isinstance(reference, VideoReference):
            image = open_image(load(reference), self._data.max_source_pixels)
            check_total(pixels_left - image.width * image.height)
            return Medium([upright_image(image)])
        problem = self._processing.video_problem
        if problem is not None and not self._data.video_as_images:
            raise RowError(
                "video_unsupported", f"{problem}; or set data.video_as_images to give the frames of videos as images"
            )
        return load_video(
            reference,
            load=load,
            list_folder=lambda path: folder.list_folder(path) if folder is not None else [],
            max_frames=self._data.max_video_frames,
            max_source_pixels=self._data.max_source_pixels,
            max_pixels=self._data.max_video_pixels,
            max_total_pixels=pixels_left,
        )

    def _finish(self, waiting: list[tuple[int, _Opened]], outcomes: list[Outcome | None]) -> None:
        encoded: list[tuple[int, _Opened, _Fitted]] = []
        for index, row in waiting:
            try:
                encoded.append((index, row, self._fit(row.mapped.messages, row.media, row.sizes)))
            except RowError as error:
                outcomes[index] = Outcome(id=row.mapped.id, error=error)
        for index, row, fitted in encoded:
            try:
                outcomes[index] = self._sample(row.mapped, row.media, fitted)
            except RowError as error:
                outcomes[index] = Outcome(id=row.mapped.id, error=error)

    def _sample(self, mapped: MappedRow, media: list[Medium], fitted: _Fitted) -> Outcome:
        notes = []
        num_tokens = len(fitted.encoded.input_ids)
        if self.limit_tokens is not None and num_tokens > self.limit_tokens:
            details: dict[str, Any] = {
                "limit_tokens": self.limit_tokens,
                "num_tokens_before": num_tokens,
                "image_sizes_before": fitted.sizes,
            }
            smaller = (
                self._shrink(mapped.messages, media, fitted.sizes)
                if media and self._data.on_too_long == "shrink_images"
                else None
            )
            if smaller is None:
                raise RowError(
                    "too_long",
                    f"the conversation has {num_tokens} tokens, over the limit of {self.limit_tokens}",
                    **details,
                )
            fitted = smaller
            num_after = len(fitted.encoded.input_ids)
            details |= {"num_tokens_after": num_after, "image_sizes_after": fitted.sizes}
            message = f"images shrunk so that {num_tokens} tokens became {num_after}"
            notes.append(Note("shrunk", "too_long", message, details))
        if fitted.num_clipped:
            message = f"{fitted.num_clipped} boxes were clipped to their image"
            notes.append(Note("warning", "box_clipped", message, {"num_clipped": fitted.num_clipped}))
        sample = Sample(
            mapped.id,
            mapped.group,
            fitted.messages,
            [self._resize(medium, size) for medium, size in zip(media, fitted.sizes, strict=True)],
            list(fitted.encoded.input_ids),
            [(int(start), int(end)) for start, end in fitted.encoded.assistant_spans],
            fitted.encoded.num_visual_tokens,
            self._metadata(mapped, media, fitted.sizes),
        )
        if not any(end > start for start, end in sample.assistant_spans):
            raise RowError(
                "no_supervised_tokens", "no token of the conversation carries loss: the answer gives no tokens"
            )
        return Outcome(id=mapped.id, sample=sample, notes=notes)

    def _resize(self, medium: Medium, size: MediumSize) -> np.ndarray | Video:
        pixels = resize(self._processing, medium, size)
        if medium.frames[0].mode != "L":
            return pixels
        # Filters work on each channel alone, so one of three equal ones is enough to keep.
        if isinstance(pixels, Video):
            return replace(pixels, frames=np.ascontiguousarray(pixels.frames[..., :1]))
        return np.ascontiguousarray(pixels[..., :1])

    def _target_sizes(self, media: list[Medium], max_pixels: int | None) -> list[MediumSize]:
        try:
            return [target_size(self._processing, medium, self._data.min_pixels, max_pixels) for medium in media]
        except ValueError as error:
            raise RowError(
                "image_size",
                f"the model cannot take an image of this size: {error}",
                sizes=[(medium.width, medium.height) for medium in media],
            ) from error

    def _fit(self, messages: list[dict[str, Any]], media: list[Medium], sizes: list[MediumSize]) -> _Fitted:
        """The conversation with its images at these sizes: coordinates that fit them, and exact tokens."""
        written, num_clipped = self._boxes(messages, _resized(media, sizes))
        length = sum(len(part.get("text", "")) for message in written for part in message["content"])
        if self.limit_tokens is not None and length > _LONGEST_TOKEN * self.limit_tokens:
            raise RowError(
                "too_long",
                f"the conversation has {length} characters, which cannot be {self.limit_tokens} tokens or fewer",
                limit_tokens=self.limit_tokens,
                num_characters=length,
            )
        try:
            encoded = self._processing.encode(written, sizes)
        except ModelError:
            raise  # not this row's fault
        except ValueError as error:
            raise RowError("not_encodable", f"the conversation cannot be turned into tokens: {error}") from error
        return _Fitted(sizes, written, encoded, num_clipped)

    def _metadata(self, mapped: MappedRow, media: list[Medium], sizes: list[MediumSize]) -> dict[str, Any]:
        """All accepted answers have to be in the convention of the one that is learnt."""
        answers = mapped.metadata.get("answers")
        if not isinstance(answers, list):
            return mapped.metadata
        resized = _resized(media, sizes)
        return {**mapped.metadata, "answers": [self._boxes.text(answer, resized)[0] for answer in answers]}

    def _shrink(self, messages: list[dict[str, Any]], media: list[Medium], sizes: list[MediumSize]) -> _Fitted | None:
        """Largest images, to within 1 %, with which the conversation fits; None if none do."""

        def attempt(max_pixels: int) -> _Fitted | None:
            fitted = self._fit(messages, media, self._target_sizes(media, max_pixels))
            return fitted if len(fitted.encoded.input_ids) <= (self.limit_tokens or 0) else None

        low = max(SMALLEST_SHRUNK_PIXELS, self._data.min_pixels or 0)
        high = max(size[-2] * size[-1] for size in sizes)
        best = attempt(low) if low < high else None
        while best is not None and high - low > max(low // 100, 1):
            middle = (low + high) // 2
            found = attempt(middle)
            if found is None:
                high = middle
            else:
                low, best = middle, found
        return best


def _resized(media: list[Medium], sizes: list[MediumSize]) -> list[ResizedImage]:
    return [
        ResizedImage((medium.height, medium.width), (size[-2], size[-1]))
        for medium, size in zip(media, sizes, strict=True)
    ]
