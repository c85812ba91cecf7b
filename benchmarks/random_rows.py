"""Rows of random pixels with an answer, as data preparation leaves them, and a prepared dataset of such rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vlm.data.rows import Sample
from vlm.data.storage import Record, SplitWriter
from vlm.processing import Processing


def random_row(processing: Processing, size: tuple[int, int], answer: str, noise: np.random.Generator) -> Sample:
    """A transcription of an image of noise.

    Args:
        processing: Gives tokens.
        size: Height and width in pixels, which the model takes as they are.
        answer: The transcription.
        noise: Draws the pixels.
    """
    question = [{"type": "image"}, {"type": "text", "text": "Transcribe the text in the image."}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    encoded = processing.encode(messages, [size])
    return Sample(
        id=None,
        group=None,
        messages=messages,
        images=[noise.integers(0, 256, (*size, 3), dtype=np.uint8)],
        input_ids=encoded.input_ids,
        assistant_spans=encoded.assistant_spans,
        num_visual_tokens=encoded.num_visual_tokens,
        metadata={},
    )


def write_prepared(folder: Path, split: str, rows: Iterable[Sample]) -> Path:
    """Writes a prepared dataset of one split; the others are empty.

    Args:
        folder: Made if it is not there.
        split: Name of the split.
        rows: Written one by one.

    Returns:
        The folder.
    """
    folder.mkdir(exist_ok=True)
    counts = {"train": 0, "validation": 0, "test": 0}
    with SplitWriter(folder / split) as writer:
        for number, row in enumerate(rows):
            writer.add(f"row-{number}", Record.of(row))
            counts[split] += 1
    (folder / "summary.json").write_text(json.dumps({"num_rows": counts, "ledger": {}}))
    return folder
