"""Packed rows of Qwen2-VL and Qwen2.5-VL: three-axis positions sample by sample, and what the tower derives from sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlm.errors import DataError
from vlm.families.family import MediaParts
from vlm.families.qwen_media import IMAGE_TOKEN, VIDEO_TOKEN

if TYPE_CHECKING:
    import torch


def positions(
    parts: MediaParts, samples: Sequence[torch.Tensor], num_images: Sequence[int], media: Mapping[str, Any]
) -> torch.Tensor:
    """Positions of a packed row, each sample's as the model itself derives them for the sample alone.

    Text advances all three axes by one per token. An image's tokens stand on a grid that starts where the text before it
    ended; the text behind it goes on from the grid's longer side.

    Args:
        parts: Processor pieces.
        samples: Ids of each sample, of shape [tokens].
        num_images: Images of each sample.
        media: Pixel inputs of all images in one row.

    Returns:
        Shape [4, 1, tokens]: the place in the sample, by which masks are made, then time, row and column.

    Raises:
        DataError: A sample has a video.
    """
    import torch

    merge = parts.image_processor.merge_size
    image_token, video_token = parts.token_id(IMAGE_TOKEN), parts.token_id(VIDEO_TOKEN)
    grids = iter(media["image_grid_thw"].tolist() if "image_grid_thw" in media else ())
    packed = []
    for ids, count in zip(samples, num_images, strict=True):
        if (ids == video_token).any():
            raise DataError("a conversation has a video, which cannot be packed; set training.packing to false")
        is_image = ids == image_token
        starts = (is_image & ~is_image.roll(1)).nonzero()[:, 0].tolist()
        if len(ids) and is_image[0] and is_image[-1]:
            starts.insert(0, 0)
        pieces, cursor, position = [], 0, 0
        for first in starts:
            times, rows, columns = next(grids)
            rows, columns = rows // merge, columns // merge
            pieces.append(torch.arange(position, position + first - cursor).expand(3, -1))
            position += first - cursor
            cells = torch.cartesian_prod(torch.arange(times), torch.arange(rows), torch.arange(columns))
            pieces.append(cells.T + position)
            position += max(rows, columns)
            cursor = first + times * rows * columns
        assert len(starts) == count, "images have tokens of their own around them"
        pieces.append(torch.arange(position, position + len(ids) - cursor).expand(3, -1))
        packed.append(torch.cat([torch.arange(len(ids))[None], torch.cat(pieces, 1)]))
    return torch.cat(packed, 1)[:, None]


def tower_inputs(config: Mapping[str, Any], media: Mapping[str, Any]) -> dict[str, Any]:
    """Positions of patches, and where images and windows end.

    transformers' own functions compute them, here and not on the model's device; the tower takes them as they are.

    Args:
        config: The model's `config.json`.
        media: Pixel inputs of all images in one row.

    Returns:
        Arguments of the vision tower; nothing without images.
    """
    if "image_grid_thw" not in media:
        return {}
    from transformers import vision_utils

    grids, vision = media["image_grid_thw"], config["vision_config"]
    merge = vision["spatial_merge_size"]
    ends = vision_utils.get_vision_cu_seqlens(grids)
    inputs = {
        "position_ids": vision_utils.get_vision_position_ids(grids, merge),
        "cu_seqlens": ends,
        "max_seqlen": int(ends.diff().max()),
    }
    if vision.get("window_size"):
        index, window_ends = vision_utils.get_vision_window_index(
            grids, merge, vision["window_size"], vision["patch_size"]
        )
        inputs |= {
            "window_index": index,
            "cu_window_seqlens": window_ends,
            "max_window_seqlen": int(window_ends.diff().max()),
        }
    return inputs
