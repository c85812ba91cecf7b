"""What the trained model gives on a few held-out rows, for exports to be compared with.

``reference.safetensors``: for row ``i``, float32, at the positions that predict the answer's tokens:

    tuned.i   Tensor of shape [positions, vocabulary], logits of the trained model
    base.i    the same of the base model, so that one can tell whether the training is in an export

``reference.json``: the rows' ids, targets and the answers that the trained model generates. Loads torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from vlm.config import GenerationConfig
from vlm.data.prepared import PreparedDataset, PreparedRow
from vlm.errors import DataError, ExportError
from vlm.generate import answer_rows, generating, longest_answer
from vlm.lora.attach import attached
from vlm.summary import Summary

if TYPE_CHECKING:
    from vlm.loading.checkpoint import LoadedModel
    from vlm.processing import Processing

TENSORS_FILE = "reference.safetensors"
DESCRIPTION_FILE = "reference.json"
# Bounds time and size: 64 positions of a vocabulary of 150,000 are 38 MB.
_MAX_POSITIONS = 64
_MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Reference(Summary):
    """Content of ``reference.json``."""

    split: str
    """Split of the rows, which are its first."""
    ids: tuple[str, ...]
    """Their ids."""
    targets: tuple[str, ...]
    """Their expected answers."""
    answers: tuple[str, ...]
    """What the trained model answers, up to `max_new_tokens`."""
    max_new_tokens: int
    """Longest generated answer."""

    @classmethod
    def read(cls, reference_dir: Path) -> Reference:
        """Reads the file.

        Args:
            reference_dir: What `make_reference` wrote.
        """
        content: dict[str, Any] = json.loads((reference_dir / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        lists = {name: tuple(content[name]) for name in ("ids", "targets", "answers")}
        return cls(**{**content, **lists})


def make_reference(
    loaded: LoadedModel,
    adapter_dir: Path,
    dataset_dir: Path,
    generation: GenerationConfig,
    num_rows: int,
    output_dir: Path,
) -> Reference:
    """Runs the trained and the base model on the first rows of a split.

    Args:
        loaded: The base model; as before when this returns.
        adapter_dir: What was trained.
        dataset_dir: Prepared dataset.
        generation: Split and longest answer.
        num_rows: How many rows at most.
        output_dir: Made if it is not there.

    Raises:
        DataError: The split has no rows, or a row has no answer.
    """
    rows = first_rows(dataset_dir, generation.split, num_rows)
    max_new_tokens = min(generation.max_new_tokens or longest_answer(dataset_dir), _MAX_NEW_TOKENS)
    tensors = {}
    with attached(loaded, None) as model, generating(model):
        for number, row in enumerate(rows):
            tensors[f"base.{number}"] = answer_logits(model, loaded.processing, row)
    with attached(loaded, adapter_dir) as model, generating(model):
        for number, row in enumerate(rows):
            tensors[f"tuned.{number}"] = answer_logits(model, loaded.processing, row)
        answers = answers_alone(model, loaded.processing, rows, max_new_tokens)
    reference = Reference(
        split=generation.split,
        ids=tuple(row.id for row in rows),
        targets=tuple(row.target for row in rows),
        answers=answers,
        max_new_tokens=max_new_tokens,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output_dir / TENSORS_FILE, metadata={"format": "pt"})
    text = json.dumps(asdict(reference), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (output_dir / DESCRIPTION_FILE).write_text(text, encoding="utf-8", newline="\n")
    return reference


def first_rows(dataset_dir: Path, split: str, num_rows: int) -> list[PreparedRow]:
    """The rows that exports are compared on.

    Args:
        dataset_dir: Prepared dataset.
        split: Its split.
        num_rows: How many at most.

    Raises:
        DataError: The split has no rows.
    """
    dataset = PreparedDataset(dataset_dir, split)
    if not len(dataset):
        raise DataError(
            f"the {split!r} split has no rows to compare exports on; choose another generation.split or set export.verify to"
            " false"
        )
    return [dataset[number] for number in range(min(num_rows, len(dataset)))]


def answer_logits(model: Any, processing: Processing, row: PreparedRow) -> torch.Tensor:
    """Logits of one row, by itself, where they predict its answer.

    Args:
        model: In the state that ``generating`` gives it.
        processing: Its processor.
        row: A prepared row.

    Returns:
        Tensor of shape [positions, vocabulary], float32, on the CPU; of the last answer's first tokens.

    Raises:
        DataError: The row has no answer.
        ExportError: The processor gives other tokens than those that the row was prepared with.
    """
    sizes = [(image.shape[0], image.shape[1]) for image in row.images]
    found = list(processing.encode(row.messages, sizes).input_ids)
    if found != row.input_ids.tolist():
        raise ExportError(
            f"the processor gives other tokens for row {row.id!r} ({len(found)}) than the model was trained with"
            f" ({len(row.input_ids)}); please report this with the model's name"
        )
    start, end = answer_positions(row)
    ids = torch.tensor([found[: end + 1]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **processing.model_inputs(ids, processing.pixel_inputs([list(row.images)])),
    }
    placed = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }
    logits: torch.Tensor = model(**placed, use_cache=False).logits[0, start:end]
    return logits.float().cpu().contiguous()


def answer_positions(row: PreparedRow) -> tuple[int, int]:
    """The half-open range of positions that predict the first tokens of a row's last answer, each the one behind it.

    Args:
        row: A prepared row.

    Raises:
        DataError: The row has no answer.
    """
    if not row.assistant_spans:
        raise DataError(f"row {row.id!r} has no assistant turn, so there is no answer to compare with; drop the row")
    start, end = row.assistant_spans[-1]
    return max(start - 1, 0), min(end, start + _MAX_POSITIONS) - 1


def answers_alone(
    model: Any, processing: Processing, rows: Sequence[PreparedRow], max_new_tokens: int
) -> tuple[str, ...]:
    """Generated answers, each row by itself.

    Args:
        model: In the state that ``generating`` gives it.
        processing: Its processor.
        rows: Prepared rows.
        max_new_tokens: Longest answer.
    """
    return tuple(answer_rows(model, processing, [row], max_new_tokens)[0].text for row in rows)
