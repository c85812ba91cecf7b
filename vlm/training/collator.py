"""Rows to a padded batch, or to one packed row: ids, mask or boundaries, labels and image tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlm.families.pixels import finished

if TYPE_CHECKING:
    from vlm.data.prepared import PreparedRow
    from vlm.processing import Processing

IGNORED = -100


class VisionDataCollator:
    """Makes one batch of prepared rows, padded on the right; `pack` makes one row of them all.

    Args:
        processing: Gives image tensors and ids of control tokens.
        train_on_prompts: Put loss on everything but padding and media tokens, rather than on the assistant's words.
        pad_to_multiple_of: Makes the length of every batch a multiple of this.
        model_config: The model's `config.json`, for packed rows; None for padded batches only.
        pixels_as_bytes: Give pixels as `PixelBytes`, a fraction of the work and of the memory; whoever takes the batch makes
            tensors of them on the model's device (`vlm.families.pixels.finished`).
    """

    def __init__(
        self,
        processing: Processing,
        *,
        train_on_prompts: bool = False,
        pad_to_multiple_of: int = 1,
        model_config: Mapping[str, Any] | None = None,
        pixels_as_bytes: bool = False,
    ) -> None:
        self.processing = processing
        self.train_on_prompts = train_on_prompts
        self.pad_to_multiple_of = pad_to_multiple_of
        self.model_config = model_config
        self.pixels_as_bytes = pixels_as_bytes
        self._media = torch.tensor(sorted(processing.media_token_ids), dtype=torch.long)

    def __call__(self, rows: Sequence[PreparedRow]) -> dict[str, Any]:
        """Collates.

        Args:
            rows: Rows of a prepared split.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, tensors of shape [batch, sequence], and the model's image
            tensors. Labels are not shifted: the model or the trainer does that.
        """
        longest = max(len(row.input_ids) for row in rows)
        length = math.ceil(longest / self.pad_to_multiple_of) * self.pad_to_multiple_of
        ids = torch.full((len(rows), length), self.processing.pad_token_id, dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORED, dtype=torch.long)
        for position, row in enumerate(rows):
            own = torch.tensor(row.input_ids, dtype=torch.long)  # a copy: the mapped file is read-only
            ids[position, : len(own)] = own
            mask[position, : len(own)] = 1
            labels[position, : len(own)] = self.labels_of(row, own)
        pixels = self.processing.pixel_bytes([list(row.images) for row in rows])
        return self._with_pixels(
            {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": labels,
                **self.processing.model_inputs(ids, pixels),
            }
        )

    def pack(self, rows: Sequence[PreparedRow]) -> dict[str, Any]:
        """Puts rows behind each other into one, without padding; for `vlm.packing.model.packed`.

        Args:
            rows: Rows of a prepared split.

        Returns:
            ``input_ids`` and ``labels`` of shape [1, tokens of all rows], ``position_ids``, ``packed_row`` and the model's
            image tensors. The first label of each row is left out: nothing of the row stands before it.
        """
        assert self.model_config is not None, "packed rows need the model's configuration"
        samples = [torch.tensor(row.input_ids, dtype=torch.long) for row in rows]
        labels = [self.labels_of(row, own) for row, own in zip(rows, samples, strict=True)]
        for own in labels:
            own[:1] = IGNORED
        return self._with_pixels(
            {
                "input_ids": torch.cat(samples)[None],
                "labels": torch.cat(labels)[None],
                **self.processing.packed_inputs(samples, [list(row.images) for row in rows], self.model_config),
            }
        )

    def _with_pixels(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch if self.pixels_as_bytes else finished(batch)

    def labels_of(self, row: PreparedRow, ids: torch.Tensor) -> torch.Tensor:
        """The ids of shape [tokens] of one row where they carry loss, else -100."""
        if self.train_on_prompts:
            return ids.masked_fill(torch.isin(ids, self._media), IGNORED)
        labels = torch.full_like(ids, IGNORED)
        for start, end in row.assistant_spans:
            labels[start:end] = ids[start:end]
        return labels
