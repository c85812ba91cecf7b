"""Conversations of all shapes for packing, and what a model makes of them one by one and packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.support.tiny_models import tiny_image
from vlm.data.prepared import PreparedRow

if TYPE_CHECKING:
    import torch

    from vlm.loading.checkpoint import LoadedModel
    from vlm.processing import Processing
    from vlm.training.collator import VisionDataCollator

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    """A part of a message."""
    return {"type": "text", "text": words}


# Parts of the question, image sizes and answer: an image first, none, text before the image, two images in a row, text
# around and between images, and a long answer.
Conversation = tuple[list[dict[str, str]], tuple[tuple[int, int], ...], str]
CONVERSATIONS: tuple[Conversation, ...] = (
    ([IMAGE, text("Transcribe the text in the image.")], ((56, 84),), "Total 12.50"),
    ([text("What is two and two?")], (), "Four, as ever"),
    ([text("Read what stands in "), IMAGE], ((56, 140),), "7"),
    ([IMAGE, IMAGE, text("Compare.")], ((56, 56), (84, 112)), "Milk 2 x 1.19"),
    ([text("First "), IMAGE, text(" then "), IMAGE, text(" and done.")], ((84, 56), (56, 84)), "Bread, cash, change"),
    ([IMAGE, text("All of it.")], ((112, 84),), "Thank you, come again, and again, and again"),
)


def pages(size: tuple[int, int]) -> tuple[Conversation, ...]:
    """Three conversations about a page of some height and width."""
    return tuple(
        ([text("Read "), IMAGE, text(" now.")], (size,), answer)
        for answer in ("Total 12.50", "7", "Milk 2 x 1.19, cash")
    )


def packing_rows(processing: Processing, conversations: Sequence[Conversation] = CONVERSATIONS) -> list[PreparedRow]:
    """One prepared row per conversation."""
    rows = []
    for number, (parts, sizes, answer) in enumerate(conversations):
        messages = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [text(answer)]},
        ]
        images = [tiny_image(*size, seed=10 * number + index) for index, size in enumerate(sizes)]
        encoded = processing.encode(messages, list(sizes))
        rows.append(
            PreparedRow(
                id=f"row-{number}",
                group=None,
                messages=messages,
                images=images,
                input_ids=np.asarray(encoded.input_ids, np.int32),
                assistant_spans=encoded.assistant_spans,
                target=answer,
                metadata={},
            )
        )
    return rows


def packing_collator(loaded: LoadedModel, **settings: Any) -> VisionDataCollator:
    """A collator that packs for a model."""
    from vlm.training.collator import VisionDataCollator

    return VisionDataCollator(loaded.processing, model_config=loaded.model.config.to_dict(), **settings)


def summed_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy of one row, summed over its supervised tokens, from the full logits."""
    import torch

    inputs = dict(batch)
    labels = inputs.pop("labels")[0, 1:]
    logits = model(**inputs, use_cache=False).logits[0, :-1].float()
    kept = labels != -100
    return torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum")


def cut(rows: Sequence[PreparedRow], number: int) -> list[list[PreparedRow]]:
    """The rows dealt out to a number of packs."""
    return [list(rows[first::number]) for first in range(number)]
