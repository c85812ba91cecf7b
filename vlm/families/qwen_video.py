"""Video handling that Qwen2-VL and Qwen2.5-VL share: frames in pairs, each pair cut into patches like an image.

frames  0 1 | 2 3 | 4 4      an odd last frame makes a pair with itself
└─ each pair is one step in time; a patch holds the same square of both frames
"""

from __future__ import annotations

from functools import partial
from typing import Any

from vlm.families.family import ImageLayout, MediaParts, Run
from vlm.families.levels import byte_levels
from vlm.families.qwen_media import VIDEO_TOKEN
from vlm.families.video import RowVideos, VideoInput


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
        ``pixel_values_videos`` of shape [patches, channels * temporal * patch * patch], ``video_grid_thw`` of shape
        [videos, 3] (time, rows, columns, in patches), and perhaps ``second_per_grid_ts``, seconds per step in time of
        each video, as a list: numbers that would lose their digits in 16 bit. Nothing for a batch without videos.
    """
    import numpy as np
    import torch

    flat = [video for row in videos for video in row]
    if not flat:
        return {}
    processor = parts.image_processor
    patch, merge, pair = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    levels = byte_levels(processor)
    pieces, grids = [], []
    for video in flat:
        frames = video.frames
        missing = -len(frames) % pair
        if missing:
            frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
        num_frames, height, width, _ = frames.shape
        assert height % (patch * merge) == 0, "frames come at their target size"
        assert width % (patch * merge) == 0, "frames come at their target size"
        steps, rows, columns = num_frames // pair, height // patch, width // patch
        split = frames.reshape(steps, pair, rows // merge, merge, patch, columns // merge, merge, patch, 3)
        # Patches that are merged into one token follow each other; within a patch: channel, frame, row, column.
        bytes_ = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(steps * rows * columns, 3, pair, patch * patch)
        values = np.empty(bytes_.shape, np.float32)
        for channel in range(3):
            values[:, channel] = levels[channel][bytes_[:, channel]]
        pieces.append(values.reshape(len(values), -1))
        grids.append((steps, rows, columns))
    made: dict[str, Any] = {
        "pixel_values_videos": torch.from_numpy(np.concatenate(pieces)),
        "video_grid_thw": torch.tensor(grids, dtype=torch.int64),
    }
    if with_seconds:
        made["second_per_grid_ts"] = [pair / video.frames_per_second for video in flat]
    return made


IN_STEPS = VideoInput(placeholder=VIDEO_TOKEN, layout=layout, inputs=partial(inputs, with_seconds=False))
IN_SECONDS = VideoInput(placeholder=VIDEO_TOKEN, layout=layout, inputs=partial(inputs, with_seconds=True))
