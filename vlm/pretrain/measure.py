"""How well a finished model reads.

Character and word error rates on drawn lines by kind, on the built-in dataset, whose typefaces it never saw, and on real
data. Loads torch and transformers.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm.config.pretrain import PretrainConfig
from vlm.data.prepared import PreparedRow
from vlm.errors import DataError
from vlm.evaluation.metrics.edit_rates import character_edits, word_edits
from vlm.generate import answer_rows, generating
from vlm.pretrain.model import PROMPTS
from vlm.pretrain.packs import conversation
from vlm.pretrain.render import draw_sample
from vlm.pretrain.text import KINDS
from vlm.processing import Processing

_BATCH_ROWS = 100
_COLUMNS = ("image", "prompt", "text")
_MAX_NEW_TOKENS = 120


@dataclass(frozen=True)
class Line:
    """An image, the question, and what it says."""

    image: Image.Image
    prompt: str
    text: str


@dataclass(frozen=True)
class Reading:
    """How well lines of one origin were read.

    Attributes:
        num_lines: How many.
        cer: Character edits over characters.
        wer: Word edits over words.
        cer_ignoring_case: The first of lower-cased texts.
        exact: Share of lines without a mistake.
    """

    num_lines: int
    cer: float
    wer: float
    cer_ignoring_case: float
    exact: float


def measure(checkpoint: Path, config: PretrainConfig, *, device: str) -> dict[str, dict[str, float]]:
    """Reads everything once.

    Args:
        checkpoint: Folder of the finished model.
        config: How many lines of each kind, and where real data is.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        Figures of `Reading` by origin.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        checkpoint, dtype="bfloat16" if device == "cuda" else "float32", local_files_only=True
    )
    model.to(device)
    processing = Processing.from_dir(checkpoint)
    readings = {}
    with generating(model):
        for origin, lines in origins(config):
            readings[origin] = asdict(read(model, processing, lines))
    return readings


def origins(config: PretrainConfig) -> Iterator[tuple[str, list[Line]]]:
    """Lines to be read, by origin."""
    for kind in KINDS:
        choose, noise = random.Random(f"measure {config.seed} {kind}"), np.random.default_rng([config.seed, len(kind)])
        longest = config.curriculum.last_longest
        drawn = [draw_sample(choose, noise, longest=longest, wear=1.0, kind=kind) for _ in range(config.rows_per_kind)]
        yield f"drawn: {kind}", [Line(image, PROMPTS[0], text) for image, text in drawn]
    yield "built-in dataset (unseen typefaces and layouts)", list(_builtin(config.rows_per_kind))
    for path in config.real_data:
        name, lines = f"real: {Path(path).parent.name} {Path(path).stem}", list(_real(path))
        yield f"{name}, its own question", lines
        yield f"{name}, a question of the training", [replace(line, prompt=PROMPTS[0]) for line in lines]


def _builtin(num_rows: int) -> Iterator[Line]:
    from vlm.data.builtin import NUM_ROWS, builtin_row

    for number in np.linspace(0, NUM_ROWS - 1, min(num_rows, NUM_ROWS)).astype(int).tolist():
        row = builtin_row(number)
        yield Line(row["image"], row["prompt"], row["text"])


def _real(path: str) -> Iterator[Line]:
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise DataError(f"real_data {path!r} is no file; give a parquet file with the columns {', '.join(_COLUMNS)}")
    file = pq.ParquetFile(path)
    missing = sorted(set(_COLUMNS) - set(file.schema_arrow.names))
    if missing:
        raise DataError(
            f"real_data {path!r} has no column {missing[0]!r}; give a file with the columns {', '.join(_COLUMNS)}"
        )
    for row in file.read(columns=list(_COLUMNS)).to_pylist():
        yield Line(Image.open(io.BytesIO(row["image"]["bytes"])).convert("L"), row["prompt"], row["text"])


def read(model: Any, processing: Processing, lines: Iterable[Line]) -> Reading:
    """Has a model read lines, and counts its mistakes. Line breaks count as spaces.

    Args:
        model: In the state that `vlm.generate.generating` gives it.
        processing: Its processor.
        lines: What to read.
    """
    # Lines of like width together, the widest first: batches pad to the longest.
    rows = sorted((_row(processing, line) for line in lines), key=lambda row: -len(row.input_ids))
    answers: list[str] = []
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = rows[start : start + _BATCH_ROWS]
        answers += [answer.text for answer in answer_rows(model, processing, batch, _MAX_NEW_TOKENS)]
    pairs = [
        (" ".join(row.target.split()), " ".join(answer.split())) for row, answer in zip(rows, answers, strict=True)
    ]

    def rate(scores: Iterable[tuple[float, float]]) -> float:
        edits, length = (sum(column) for column in zip(*scores, strict=True))
        return round(edits / max(length, 1), 4)

    return Reading(
        num_lines=len(pairs),
        cer=rate(character_edits(text, answer) for text, answer in pairs),
        wer=rate(word_edits(text, answer) for text, answer in pairs),
        cer_ignoring_case=rate(character_edits(text.lower(), answer.lower()) for text, answer in pairs),
        exact=round(sum(text == answer for text, answer in pairs) / max(len(pairs), 1), 4),
    )


def _row(processing: Processing, line: Line) -> PreparedRow:
    size = processing.target_size(line.image.height, line.image.width)
    messages = conversation(line.prompt, line.text)
    encoded = processing.encode(messages, [size])
    return PreparedRow(
        id="",
        group=None,
        messages=messages,
        images=[processing.resize_image(line.image, size)],
        input_ids=np.asarray(encoded.input_ids, np.int32),
        assistant_spans=list(encoded.assistant_spans),
        target=line.text,
        metadata={},
    )
