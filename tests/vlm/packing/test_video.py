"""Videos in packed rows: positions, and loss and gradients against one by one."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.support.packing_rows import packing_collator, packing_rows, summed_loss, text
from vlm.data.prepared import PreparedRow
from vlm.families import FAMILIES, Video
from vlm.packing.model import packed
from vlm.processing import Processing

WITH_VIDEO = [name for name, family in FAMILIES.items() if family.video is not None and family.packing is not None]


def video_row(processing: Processing, shapes: tuple[tuple[int, ...], ...], rate: float, seed: int) -> PreparedRow:
    """Videos (three numbers: frames, height, width) and images (two) before a question."""
    generator = np.random.default_rng(seed)
    kinds = ["video" if len(shape) == 3 else "image" for shape in shapes]
    messages = [
        {"role": "user", "content": [*({"type": kind} for kind in kinds), text("What happens?")]},
        {"role": "assistant", "content": [text("It rains")]},
    ]
    encoded = processing.encode(messages, shapes)
    arrays = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return PreparedRow(
        id=f"video-{seed}",
        group=None,
        messages=messages,
        images=[Video(array, rate) if array.ndim == 4 else array for array in arrays],
        input_ids=np.asarray(encoded.input_ids, np.int32),
        assistant_spans=encoded.assistant_spans,
        target="It rains",
        metadata={},
    )


@pytest.mark.parametrize("model_type", WITH_VIDEO)
def test_videos_among_images(tiny_run: Callable, model_type: str) -> None:
    loaded = tiny_run(model_type).loaded
    collator = packing_collator(loaded)
    rows = [
        video_row(loaded.processing, ((4, 56, 84),), 2.0, 1),
        *packing_rows(loaded.processing)[:2],
        video_row(loaded.processing, ((56, 56), (6, 56, 56), (2, 84, 56)), 0.5, 2),
    ]
    batch = collator.pack(rows)
    lengths = [len(row.input_ids) for row in rows]
    positions = batch["position_ids"][1:, 0].split(lengths, 1)
    losses = []
    with torch.no_grad():
        for row, found in zip(rows, positions, strict=True):
            alone = collator([row])
            losses.append(summed_loss(loaded.model, alone))
            names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
            media = {name: alone[name] for name in names if name in alone}
            if media:
                expected, _ = loaded.model.model.get_rope_index(alone["input_ids"], alone["mm_token_type_ids"], **media)
                assert torch.equal(found, expected[:, 0])
        with packed(loaded.model, loaded.family):
            together = summed_loss(loaded.model, batch)
    assert together.item() == pytest.approx(float(sum(losses)), rel=1e-5)
