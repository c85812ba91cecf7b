"""Packed rows of Llama 3.2 Vision: cross-attention by spans of text and the tiles that each looks at.

    text   a a <image> a a a | b b | c <image> <image> c c          samples a, b, c in one row
    tiles    1 1 1 1           none  2 2 2 2 3 3 3 3                of three images, in one row as well

    span of text           looks at
    a a                    all tiles of a's images, padding included
    <image> a a a          image 1's own tiles
    b b                    nothing: the layer is skipped for it
    c                      all tiles of c's images, padding included
    <image>                image 2's own tiles
    <image> c c            image 2's and 3's own tiles

That a text before its sample's first image looks at everything there is transformers' own rule for a sample alone (see
`mllama_rows`), and so the model's. Spans that look at the same tiles are one, as with a single image that fills its
canvas; and where the spans are the whole row and their tiles all there are, in order, nothing is gathered: keys and values
of a page are 6,404 positions in every cross-attention layer, and copies of them would be kept. Vision tower and projector
handle images apart from each other anyway.

torch is imported when a function runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlm.families.family import PackedSamples
from vlm.families.mllama_media import IMAGE_TOKEN

if TYPE_CHECKING:
    import torch
    from torch import nn

_CROSS = "cross_segments"


def row_inputs(packed: PackedSamples) -> dict[str, Any]:
    """Spans of text and the tiles that they look at.

    Args:
        packed: The samples.

    Returns:
        Into the packed row: ``span_lengths`` and ``span_tiles`` (lists: positions in each span, tiles that it looks at),
        ``span_queries`` of shape [positions in spans], None for the whole row, ``tiles`` of shape [tiles of all spans],
        None for all in order, and ``belongs`` of shape [tokens]: 1 where a position stands behind an image of its sample.
        Nothing without images.
    """
    import torch

    if "aspect_ratio_mask" not in packed.media:
        return {}
    tile_mask = packed.media["aspect_ratio_mask"][0]
    most_tiles = tile_mask.shape[1]
    own = tile_mask.sum(-1).tolist()
    image_token = packed.parts.token_id(IMAGE_TOKEN)
    lengths: list[int] = []
    counts: list[int] = []
    queries: list[torch.Tensor] = []
    tiles: list[int] = []
    belongs = torch.zeros(sum(len(ids) for ids in packed.samples))
    start = first_image = 0
    for ids, count in zip(packed.samples, packed.num_media, strict=True):
        images = (ids == image_token).nonzero()[:, 0].tolist()
        assert len(images) == count, "each image has one token"
        if images:
            belongs[start + images[0] : start + len(ids)] = 1
        before: list[int] | None = None
        for begin, end, seen in _spans(images, len(ids)):
            numbers = range(count) if seen is None else seen
            looked_at = [
                (first_image + number) * most_tiles + tile
                for number in numbers
                for tile in range(most_tiles if seen is None else own[first_image + number])
            ]
            if looked_at == before:
                lengths[-1] += end - begin
            else:
                lengths.append(end - begin)
                counts.append(len(looked_at))
                tiles.extend(looked_at)
            queries.append(torch.arange(start + begin, start + end))
            before = looked_at
        start += len(ids)
        first_image += count
    return {
        "span_lengths": lengths,
        "span_tiles": counts,
        # Spans come in the order of the row and do not overlap.
        "span_queries": None if sum(lengths) == start else torch.cat(queries),
        "tiles": None if tiles == list(range(tile_mask.numel())) else torch.tensor(tiles, dtype=torch.int64),
        "belongs": belongs,
    }


def _spans(images: Sequence[int], length: int) -> Iterator[tuple[int, int, Sequence[int] | None]]:
    """Stretches of a sample's positions with the numbers of the images that they look at; None for all and everything."""
    if not images:
        return
    if images[0] > 0:
        yield 0, images[0], None
    group = 0
    for number, position in enumerate(images):
        # Images that follow each other directly are looked at together.
        if number and position != images[number - 1] + 1:
            group = number
        end = images[number + 1] if number + 1 < len(images) else length
        yield position, end, range(group, number + 1)


def language_inputs(model: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the language model's layers get beside the segments of self-attention.

    Args:
        model: A `MllamaForConditionalGeneration`.
        row: The packed row, on the device of the model.
    """
    if "belongs" not in row:
        return {}
    import torch

    from vlm.packing.attention import Segments, ends_of

    vision, tiles, device = model.config.vision_config, row["tiles"], row["belongs"].device
    per_tile = (vision.image_size // vision.patch_size) ** 2 + 1
    lengths = [count * per_tile for count in row["span_tiles"]]
    segments = Segments(
        ends_of(row["span_lengths"], device),
        row["span_lengths"],
        ends_of(lengths, device),
        lengths,
        causal=False,
        queries=row["span_queries"],
        keys=None if tiles is None else (tiles[:, None] * per_tile + torch.arange(per_tile, device=device)).flatten(),
    )
    # Shape [1, 1, tokens, 1]: the feed-forward half of a cross-attention layer is for text behind an image only.
    belongs = row["belongs"].to(model.dtype)[None, None, :, None]
    return {_CROSS: segments, "full_text_row_masked_out_mask": belongs}


def install(model: Any) -> list[Any]:
    """Hooks that hand each cross-attention its own segments.

    Args:
        model: A `MllamaForConditionalGeneration`.

    Returns:
        Handles that remove them.
    """
    return [
        layer.cross_attn.register_forward_pre_hook(_cross, with_kwargs=True)
        for layer in model.model.language_model.layers
        if hasattr(layer, "cross_attn")
    ]


def _cross(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    segments = kwargs.get(_CROSS)
    return None if segments is None else (args, {**kwargs, "segments": segments})
