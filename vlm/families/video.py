"""Videos as models take them: frames at their target size, and how fast these follow each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from vlm.families.family import ImageLayout, MediaParts


@dataclass(frozen=True)
class Video:
    """A video.

    Attributes:
        frames: uint8 array of shape [frames, height, width, 3], at target size.
        frames_per_second: Of these frames, not of the film that they were taken from.
    """

    frames: np.ndarray
    frames_per_second: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Frames, height, width, channels; so that everything but the last is a size, as for an image."""
        return self.frames.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all frames."""
        return self.frames.nbytes


# Videos of a batch, one sequence per row of the batch.
RowVideos = Sequence[Sequence[Video]]


@dataclass(frozen=True, kw_only=True)
class VideoInput:
    """How a family takes videos. Frames are resized like images.

    Attributes:
        placeholder: What the chat template writes for a video, before it is expanded.
        layout: `(parts, frames, height, width)` of a video at its target size to the text that stands for it.
        inputs: `(parts, videos of each row)` to the model's video tensors, and lists where the model takes those.
    """

    placeholder: str
    layout: Callable[[MediaParts, int, int, int], ImageLayout]
    inputs: Callable[[MediaParts, RowVideos], dict[str, Any]]
