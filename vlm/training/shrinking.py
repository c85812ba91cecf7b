"""Smaller micro-batches from where one did not fit into the device's memory. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlm.errors import ResourceError

_logger = logging.getLogger(__name__)


class Shrinking:
    """Splits micro-batches that are larger than one that failed.

    Args:
        lengths: Array of shape [rows]: tokens of each row of the training split.
    """

    def __init__(self, lengths: npt.NDArray[np.int64]) -> None:
        self._lengths = lengths
        self._most_tokens: int | None = None

    def parts(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """The micro-batches of a step, those over the limit split in halves until none is.

        Args:
            rows: Row numbers of each micro-batch.
        """
        parts: list[list[int]] = []
        waiting = [list(part) for part in reversed(rows)]
        while waiting:
            part = waiting.pop()
            if self._most_tokens is None or len(part) == 1 or self._tokens(part) <= self._most_tokens:
                parts.append(part)
                continue
            # Dealt out by length, so that both halves cost about the same.
            dealt = sorted(part, key=lambda row: -int(self._lengths[row]))
            waiting += [sorted(dealt[1::2]), sorted(dealt[::2])]
        return parts

    def halve(self, rows: Sequence[int], step: int) -> None:
        """Lowers the limit to half of a micro-batch that ran out of memory.

        Args:
            rows: Its row numbers.
            step: Finished steps.

        Raises:
            ResourceError: It is a single row.
        """
        tokens = self._tokens(rows)
        if len(rows) == 1:
            raise ResourceError(
                f"row {rows[0]} of the training split, with {tokens} tokens, does not fit into the GPU's memory by itself;"
                " set training.activation_memory to 'offload', lower data.max_pixels or data.max_length_tokens, or take a larger GPU"
            )
        self._most_tokens = max(1, tokens // 2)
        _logger.warning(
            "out of memory in step %d with %d conversations of %d tokens in one pass; going on with at most %d tokens",
            step + 1,
            len(rows),
            tokens,
            self._most_tokens,
        )

    def _tokens(self, rows: Sequence[int]) -> int:
        return int(self._lengths[list(rows)].sum())
