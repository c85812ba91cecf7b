"""Video handling that Qwen2-VL and Qwen2.5-VL share: frames in pairs, each pair cut into patches like an image.

frames  0 1 | 2 3 | 4 4      an odd last frame makes a pair with itself
└─ each pair is one step in time; a patch holds the same square of both frames
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vlm.families.family import ImageLayout, MediaParts, Run
from vlm.families.pixels import Numbers, PixelBytes
from vlm.families.qwen_media import VIDEO_TOKEN
from vlm.families.video import RowVideos, VideoInput

if TYPE_CHECKING:
    import torch


def layout(parts: MediaParts, num_frames: int, height: int, width: int) -> ImageLayout:
    """One video token per merged patch of each pair of frames."""
    processor = parts.image_processor
    factor = processor.patch_size * processor.merge_size
    num_pairs = -(-num_frames // processor.temporal_patch_size)
    return (Run(VIDEO_TOKEN, num_pairs * (height // factor) * (width // factor)),)


def inputs(parts: MediaParts, videos: RowVideos, *, with_seconds: bool) -> dict[str, Any]:
    """Patches of all videos of the batch, one after the other.

    Args:
        parts: Processor pieces; videos have the settings of images.
        videos: At their target size.
        with_seconds: Give the time between pairs of frames, too, for models whose positions count in seconds.

    Returns:
        ``pixel_values_videos`` of shape [patches, channels * temporal * patch * patch], still as bytes, ``video_grid_thw``
        of shape [videos, 3] (time, rows, columns, in patches), and perhaps ``second_per_grid_ts``, seconds per step in time of
        each video, as a list: numbers that would lose their digits in 16 bit. Nothing for a batch without videos.
    """
    import torch

    flat = [video for row in videos for video in row]
    if not flat:
        return {}
    processor = parts.image_processor
    patch, merge, pair = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    grids = []
    for num_frames, height, width, _ in (video.frames.shape for video in flat):
        assert height % (patch * merge) == 0, "frames come at their target size"
        assert width % (patch * merge) == 0, "frames come at their target size"
        grids.append((-(-num_frames // pair), height // patch, width // patch))
    made: dict[str, Any] = {
        "pixel_values_videos": PixelBytes.of(
            [video.frames for video in flat], processor, partial(_patches, patch=patch, merge=merge, pair=pair)
        ),
        "video_grid_thw": torch.tensor(grids, dtype=torch.int64),
    }
    if with_seconds:
        made["second_per_grid_ts"] = [pair / video.frames_per_second for video in flat]
    return made


def _patches(videos: Sequence[torch.Tensor], numbers: Numbers, *, patch: int, merge: int, pair: int) -> torch.Tensor:
    """Patches that are merged into one token follow each other; within a patch: channel, frame, row, column."""
    import torch

    cut = []
    for frames in videos:
        missing = -len(frames) % pair
        if missing:
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        steps, rows, columns = (
            len(frames) // pair,
            frames.shape[1] // (patch * merge),
            frames.shape[2] // (patch * merge),
        )
        split = frames.reshape(steps, pair, rows, merge, patch, columns, merge, patch, 3)
        cut.append(split.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3, pair, patch * patch))
    return numbers(torch.cat(cut), 1).flatten(1)


IN_STEPS = VideoInput(placeholder=VIDEO_TOKEN, layout=layout, inputs=partial(inputs, with_seconds=False))
IN_SECONDS = VideoInput(placeholder=VIDEO_TOKEN, layout=layout, inputs=partial(inputs, with_seconds=True))
