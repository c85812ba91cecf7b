"""Packs of drawn lines, made in worker processes: plain arrays, with patches still as grey bytes.

A pack of 65,536 positions is 8 MB this way, and would be 180 MB with the floats that the model takes; those are made on
its device (`vlm.pretrain.batch`). Ids, labels, positions and boundaries are what `vlm.training.collator` makes.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from vlm.config.pretrain import CurriculumConfig
from vlm.pretrain.model import MAIN_PROMPT_SHARE, PROMPTS
from vlm.pretrain.render import Grey, draw_sample
from vlm.pretrain.schedule import difficulty_of_line
from vlm.processing import Processing
from vlm.processing.files import read_json
from vlm.training.collator import IGNORED

PATCH_BYTES = 14 * 14

Arrays = dict[str, Any]


class PackMaker:
    """Draws packs. A pack depends on seed, number and share alone, so a resumed training sees what it would have seen.

    Args:
        processor_dir: A checkpoint folder with the model's config, tokenizer and processor.
        curriculum: How hard lines are.
        positions: Patches and tokens of a pack.
        seed: Of all packs.
    """

    def __init__(self, processor_dir: Path, curriculum: CurriculumConfig, positions: int, seed: int) -> None:
        self._processing = Processing.from_dir(processor_dir)
        self._config = read_json(processor_dir / "config.json")
        self._curriculum = curriculum
        self._positions = positions
        self._seed = seed

    def __call__(self, number: int, done: float) -> Arrays:
        """Draws one pack.

        Args:
            number: Which one.
            done: Share of the training, which sets how hard its lines are.

        Returns:
            ``input_ids`` and ``labels`` of shape [1, tokens], ``position_ids`` of shape [4, 1, tokens], ``image_grid_thw`` of
            shape [images, 3], ``packed_row``, and ``patches``: grey bytes of shape [patches, 196]. All in numpy.
        """
        choose = random.Random(f"{self._seed} {number}")
        noise = np.random.default_rng([self._seed, number])
        samples: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        images: list[Grey] = []
        free = self._positions
        while True:
            level = difficulty_of_line(self._curriculum, done, choose)
            kind = "figures" if choose.random() < level.figures else None
            drawn, text = draw_sample(choose, noise, longest=level.longest, wear=level.wear, kind=kind)
            image, ids, own = self._conversation(drawn, draw_prompt(choose), text)
            free -= len(ids) + image.size // PATCH_BYTES
            if free < 0 and samples:
                return self._pack(samples, labels, images)
            samples.append(ids)
            labels.append(own)
            images.append(image)

    def _conversation(self, drawn: Image, prompt: str, text: str) -> tuple[Grey, torch.Tensor, torch.Tensor]:
        size = self._processing.target_size(drawn.height, drawn.width)
        encoded = self._processing.encode(conversation(prompt, text), [size])
        ids = torch.from_numpy(np.asarray(encoded.input_ids, np.int64))
        labels = torch.full_like(ids, IGNORED)
        for start, end in encoded.assistant_spans:
            labels[start:end] = ids[start:end]
        return self._processing.resize_image(drawn, size)[..., 0], ids, labels

    def _pack(self, samples: list[torch.Tensor], labels: list[torch.Tensor], images: list[Grey]) -> Arrays:
        grids = torch.tensor([(1, image.shape[0] // 14, image.shape[1] // 14) for image in images])
        inputs = self._processing.packed_inputs(
            samples, [[image] for image in images], self._config, media={"image_grid_thw": grids}
        )
        pack: Arrays = _to_numpy({"input_ids": torch.cat(samples)[None], "labels": torch.cat(labels)[None], **inputs})
        pack["patches"] = np.concatenate([patches_of(image) for image in images])
        return pack


def draw_prompt(choose: random.Random) -> str:
    """One of `PROMPTS`, the first one most often."""
    return PROMPTS[0] if choose.random() < MAIN_PROMPT_SHARE else choose.choice(PROMPTS)


def conversation(prompt: str, text: str) -> list[dict[str, Any]]:
    """An image, a question, and the answer, as messages."""
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
    ]


def patches_of(image: Grey) -> Grey:
    """Cuts a grey image into patches, in the order in which the model takes them.

    Args:
        image: Shape [height, width], both whole merged patches of 28 pixels.

    Returns:
        Shape [patches, 196].
    """
    rows, columns = image.shape[0] // 28, image.shape[1] // 28
    squares = image.reshape(rows, 2, 14, columns, 2, 14)
    return squares.transpose(0, 3, 1, 4, 2, 5).reshape(rows * columns * 4, PATCH_BYTES)


def _to_numpy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {name: _to_numpy(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_to_numpy(entry) for entry in value]
    return value
