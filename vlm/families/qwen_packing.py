"""Packed rows of Qwen2-VL and Qwen2.5-VL: three-axis positions sample by sample, and what the tower derives from sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vlm.families.family import PackedSamples
from vlm.families.qwen_media import IMAGE_TOKEN, VIDEO_TOKEN

if TYPE_CHECKING:
    import torch


def positions(
    packed: PackedSamples, *, image_token: str = IMAGE_TOKEN, video_token: str | None = VIDEO_TOKEN
) -> torch.Tensor:
    """Positions of a packed row, each sample's as the model itself derives them for the sample alone.

    Text advances all three axes by one per token. The tokens of an image or a video stand on a grid that starts where the
    text before it ended; the text behind it goes on from the grid's longer side in space.

    Args:
        packed: The samples.
        image_token: Stands for a merged patch of an image.
        video_token: The same of a video; None for a family that takes none.

    Returns:
        Shape [4, 1, tokens]: the place in the sample, by which masks are made, then time, row and column.
    """
    import torch

    grids = {packed.parts.token_id(image_token): _image_grids(packed)}
    if video_token is not None:
        grids[packed.parts.token_id(video_token)] = _video_grids(packed)
    rows = []
    for ids, count in zip(packed.samples, packed.num_media, strict=True):
        pieces, cursor, position = [], 0, 0
        for first in _starts(ids, list(grids)):
            times, height, width = next(grids[int(ids[first])])
            pieces.append(torch.arange(position, position + first - cursor).expand(3, -1))
            position += first - cursor
            cells = torch.cartesian_prod(times, torch.arange(height), torch.arange(width))
            pieces.append(cells.T + position)
            position += max(height, width)
            cursor = first + len(cells)
            count -= 1
        assert count == 0, "images and videos have tokens of their own around them"
        pieces.append(torch.arange(position, position + len(ids) - cursor).expand(3, -1))
        rows.append(torch.cat([torch.arange(len(ids))[None], torch.cat(pieces, 1)]))
    return torch.cat(rows, 1)[:, None]


def _starts(ids: torch.Tensor, tokens: list[int]) -> list[int]:
    """Where runs of media tokens start."""
    import torch

    is_medium = torch.isin(ids, torch.tensor(tokens))
    before = torch.cat([is_medium.new_zeros(1), is_medium[:-1]])
    return [int(place) for place in (is_medium & ~before).nonzero()[:, 0]]


Grid = tuple["torch.Tensor", int, int]


def _image_grids(packed: PackedSamples) -> Iterator[Grid]:
    import torch

    merge = packed.parts.image_processor.merge_size
    for steps, rows, columns in _sizes(packed.media, "image_grid_thw"):
        yield torch.arange(steps), rows // merge, columns // merge


def _video_grids(packed: PackedSamples) -> Iterator[Grid]:
    """Time goes in steps, or, where the model counts seconds, in whole positions of them."""
    import torch

    merge = packed.parts.image_processor.merge_size
    sizes = _sizes(packed.media, "video_grid_thw")
    seconds = packed.media.get("second_per_grid_ts", [1] * len(sizes))
    per_second = packed.config["vision_config"].get("tokens_per_second", 1) if sizes else 1
    for (steps, rows, columns), step in zip(sizes, seconds, strict=True):
        yield (torch.arange(steps) * (per_second * step)).long(), rows // merge, columns // merge


def _sizes(media: Mapping[str, Any], name: str) -> list[list[int]]:
    return media[name].tolist() if name in media else []


def tower_inputs(packed: PackedSamples) -> list[dict[str, Any]]:
    """Positions of patches, and where images and windows end.

    transformers' own functions compute them, here and not on the model's device; the tower takes them as they are.

    Args:
        packed: The samples.

    Returns:
        Arguments of the vision tower: for its call with all images, then for the one with all videos.
    """
    from transformers import vision_utils

    vision = packed.config["vision_config"]
    merge = vision["spatial_merge_size"]
    calls = []
    for name in ("image_grid_thw", "video_grid_thw"):
        if name not in packed.media:
            continue
        grids = packed.media[name]
        ends = vision_utils.get_vision_cu_seqlens(grids)
        inputs: dict[str, Any] = {
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
        calls.append(inputs)
    return calls
