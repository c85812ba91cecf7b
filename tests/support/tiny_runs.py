"""Tiny loaded models and prepared datasets, for the tests of training, generation and export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.tiny_models import fitted, make_tiny_checkpoint, tiny_conversation
from vlm.config import ModelConfig

if TYPE_CHECKING:
    from vlm.loading.checkpoint import LoadedModel
    from vlm.processing import Processing

ANSWERS = ("Total 12.50", "7", "Milk 2 x 1.19", "Thank you, come again", "Bread", "0.99 EUR", "Cash", "Change 3.20")
SIZES = ((56, 84), (56, 56), (84, 112), (56, 140))


def make_checkpoint(model_type: str, folder: Path, quantization: str = "none") -> Path:
    """A checkpoint artifact of a tiny model, as step 1 makes it.

    Args:
        model_type: Name in the family table.
        folder: An empty folder for the source model and the artifact.
        quantization: ``none``, ``nf4`` or ``int8``.
    """
    from vlm.loading.build import build_checkpoint

    source = make_tiny_checkpoint(model_type, folder / "source")
    artifact = folder / "checkpoint"
    artifact.mkdir()
    config = ModelConfig(name=str(source), quantization=quantization, precision="float32")
    build_checkpoint(config, artifact, device="cpu", dtype="float32")
    return artifact


def load(checkpoint_dir: Path) -> LoadedModel:
    """Loads a checkpoint artifact on the CPU."""
    from vlm.loading.checkpoint import load_checkpoint

    return load_checkpoint(checkpoint_dir, device="cpu")


def write_dataset(
    folder: Path, processing: Processing, rows: Mapping[str, Sequence[tuple[str, tuple[tuple[int, int], ...]]]]
) -> Path:
    """Writes a prepared dataset of random images with the project's own writer.

    Args:
        folder: Made if it is not there.
        processing: Gives the tokens.
        rows: By split, pairs of an answer and the sizes of its images.
    """
    from vlm.data.rows import Sample
    from vlm.data.storage import Record, SplitWriter

    folder.mkdir(parents=True, exist_ok=True)
    seed = 0
    for split in ("train", "validation", "test"):
        with SplitWriter(folder / split) as writer:
            for number, (answer, sizes) in enumerate(rows.get(split, ())):
                seed += 10
                messages, images = tiny_conversation(answer, sizes, seed)
                images = fitted(processing, images)
                encoded = processing.encode(messages, [image.shape[:2] for image in images])
                sample = Sample(
                    id=None,
                    group=None,
                    messages=messages,
                    images=images,
                    input_ids=encoded.input_ids,
                    assistant_spans=encoded.assistant_spans,
                    num_visual_tokens=encoded.num_visual_tokens,
                    metadata={},
                )
                writer.add(f"{split}-{number}", Record.of(sample))
    counts = {split: len(rows.get(split, ())) for split in ("train", "validation", "test")}
    (folder / "summary.json").write_text(json.dumps({"num_rows": counts, "ledger": {}}))
    return folder


def mixed_rows(number: int) -> list[tuple[str, tuple[tuple[int, int], ...]]]:
    """Rows of several lengths: one image, two images, none."""
    kinds: list[tuple[tuple[int, int], ...]] = [(SIZES[0],), (SIZES[1], SIZES[3]), (), (SIZES[2],)]
    return [(ANSWERS[i % len(ANSWERS)], kinds[i % len(kinds)]) for i in range(number)]


def batch_of(loaded: LoadedModel, dataset_dir: Path, split: str, rows: Sequence[int]) -> dict[str, Any]:
    """A collated batch of some rows."""
    from vlm.data.prepared import PreparedDataset
    from vlm.training.collator import VisionDataCollator

    dataset = PreparedDataset(dataset_dir, split)
    return VisionDataCollator(loaded.processing)([dataset[row] for row in rows])
