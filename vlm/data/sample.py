"""Rows from references to finished samples: decode, measure, shrink if they must be, resize once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlm.config.data import BoxConvention, DataConfig
from vlm.data.boxes import BoxWriter, ResizedImage
from vlm.data.images import ImageFolder, load_image_bytes, open_image, upright_image
from vlm.data.mapping import Columns, map_row, row_name
from vlm.data.rows import MappedRow, Note, Outcome, Row, RowError, Sample, UnreadableRow

# Below this an image shows nothing that can be read, so shrinking further would only hide that the row does not fit.
SMALLEST_SHRUNK_PIXELS = 56 * 56
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

    def target_size(
        self, height: int, width: int, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> tuple[int, int]:
        """Size in pixels, (height, width), that the model sees an image at."""

    def resize_image(self, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """Pixels of shape [height, width, 3], uint8, resized with the model's own filter."""

    def encode(
        self, messages: list[dict[str, Any]], image_sizes: list[tuple[int, int]], add_generation_prompt: bool = False
    ) -> EncodedConversation:
        """Tokens of a conversation whose images have these sizes."""


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
    """A row with its images decoded and their target sizes."""

    mapped: MappedRow
    images: list[Image.Image]
    sizes: list[tuple[int, int]]


@dataclass(frozen=True)
class _Fitted:
    """A conversation with its images at certain sizes."""

    sizes: list[tuple[int, int]]
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
            num_pixels += sum(image.width * image.height for image in opened.images)
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
            images = []
            for reference in mapped.images:
                data = load_image_bytes(reference, job.folder, allow_urls=self._data.allow_urls)
                images.append(upright_image(open_image(data, self._data.max_source_pixels)))
            return _Opened(mapped, images, self._target_sizes(images, self._data.max_pixels))
        except RowError as error:
            return Outcome(id=row_id, error=error)

    def _finish(self, waiting: list[tuple[int, _Opened]], outcomes: list[Outcome | None]) -> None:
        encoded: list[tuple[int, _Opened, _Fitted]] = []
        for index, row in waiting:
            try:
                encoded.append((index, row, self._fit(row.mapped.messages, row.images, row.sizes)))
            except RowError as error:
                outcomes[index] = Outcome(id=row.mapped.id, error=error)
        for index, row, fitted in encoded:
            try:
                outcomes[index] = self._sample(row.mapped, row.images, fitted)
            except RowError as error:
                outcomes[index] = Outcome(id=row.mapped.id, error=error)

    def _sample(self, mapped: MappedRow, images: list[Image.Image], fitted: _Fitted) -> Outcome:
        notes = []
        num_tokens = len(fitted.encoded.input_ids)
        if self.limit_tokens is not None and num_tokens > self.limit_tokens:
            details: dict[str, Any] = {
                "limit_tokens": self.limit_tokens,
                "num_tokens_before": num_tokens,
                "image_sizes_before": fitted.sizes,
            }
            smaller = (
                self._shrink(mapped.messages, images, fitted.sizes)
                if images and self._data.on_too_long == "shrink_images"
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
            [self._resize(image, size) for image, size in zip(images, fitted.sizes, strict=True)],
            list(fitted.encoded.input_ids),
            [(int(start), int(end)) for start, end in fitted.encoded.assistant_spans],
            fitted.encoded.num_visual_tokens,
            self._metadata(mapped, images, fitted.sizes),
        )
        if not any(end > start for start, end in sample.assistant_spans):
            raise RowError(
                "no_supervised_tokens", "no token of the conversation carries loss: the answer gives no tokens"
            )
        return Outcome(id=mapped.id, sample=sample, notes=notes)

    def _resize(self, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        pixels = self._processing.resize_image(image, size)
        # Filters work on each channel alone, so one of three equal ones is enough to keep.
        return np.ascontiguousarray(pixels[:, :, :1]) if image.mode == "L" else pixels

    def _target_sizes(self, images: list[Image.Image], max_pixels: int | None) -> list[tuple[int, int]]:
        min_pixels = self._data.min_pixels
        try:
            return [
                self._processing.target_size(image.height, image.width, min_pixels=min_pixels, max_pixels=max_pixels)
                for image in images
            ]
        except ValueError as error:
            raise RowError(
                "image_size",
                f"the model cannot take an image of this size: {error}",
                sizes=[image.size for image in images],
            ) from error

    def _fit(self, messages: list[dict[str, Any]], images: list[Image.Image], sizes: list[tuple[int, int]]) -> _Fitted:
        """The conversation with its images at these sizes: coordinates that fit them, and exact tokens."""
        written, num_clipped = self._boxes(messages, _resized(images, sizes))
        try:
            encoded = self._processing.encode(written, sizes)
        except ValueError as error:
            raise RowError("not_encodable", f"the conversation cannot be turned into tokens: {error}") from error
        return _Fitted(sizes, written, encoded, num_clipped)

    def _metadata(self, mapped: MappedRow, images: list[Image.Image], sizes: list[tuple[int, int]]) -> dict[str, Any]:
        """All accepted answers have to be in the convention of the one that is learnt."""
        answers = mapped.metadata.get("answers")
        if not isinstance(answers, list):
            return mapped.metadata
        resized = _resized(images, sizes)
        return {**mapped.metadata, "answers": [self._boxes.text(answer, resized)[0] for answer in answers]}

    def _shrink(
        self, messages: list[dict[str, Any]], images: list[Image.Image], sizes: list[tuple[int, int]]
    ) -> _Fitted | None:
        """Largest images, to within 1 %, with which the conversation fits; None if none do."""

        def attempt(max_pixels: int) -> _Fitted | None:
            fitted = self._fit(messages, images, self._target_sizes(images, max_pixels))
            return fitted if len(fitted.encoded.input_ids) <= (self.limit_tokens or 0) else None

        low = max(SMALLEST_SHRUNK_PIXELS, self._data.min_pixels or 0)
        high = max(height * width for height, width in sizes)
        best = attempt(low) if low < high else None
        while best is not None and high - low > max(low // 100, 1):
            middle = (low + high) // 2
            found = attempt(middle)
            if found is None:
                high = middle
            else:
                low, best = middle, found
        return best


def _resized(images: list[Image.Image], sizes: list[tuple[int, int]]) -> list[ResizedImage]:
    return [ResizedImage((image.height, image.width), size) for image, size in zip(images, sizes, strict=True)]
