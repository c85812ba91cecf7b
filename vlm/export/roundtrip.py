"""Loads an export the way its users do and runs it on the reference's rows; `verify` starts it in a process of its own.

    python -m vlm.export.roundtrip request.json result.json

Exports load with ``AutoModelForImageTextToText`` and, for an adapter, ``PeftModel``, GGUF files in llama.cpp: none of
this project's loaders. What comes on top changes no weight: the mends of `Family.prepare_model` and of 8-bit layers on a CPU,
which the trained model ran with too. Loads torch and transformers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from vlm.data.prepared import PreparedRow
from vlm.errors import ExportError, VlmError
from vlm.export.gguf.support import check_supported
from vlm.export.reference import (
    TENSORS_FILE,
    Reference,
    answer_logits,
    answer_positions,
    answers_alone,
    first_rows,
)
from vlm.families import Video
from vlm.generate import generating, prompt_of
from vlm.processing import Processing
from vlm.summary import Summary


@dataclass(frozen=True)
class Request:
    """What to load and what to compare it with. Paths as text, so that it can be written down."""

    kind: str
    """Type of the export."""
    export_dir: str
    """Its folder."""
    checkpoint_dir: str
    """Base model, which an adapter needs."""
    dataset_dir: str
    """Prepared dataset with the reference's rows."""
    reference_dir: str
    """What the trained model gave."""
    device: str
    """``cpu`` or ``cuda``."""


@dataclass(frozen=True)
class Measured(Summary):
    """What the loaded export gave."""

    distance: float
    """‖found − trained‖ / ‖trained‖ over all logits, each position's mean taken off, which changes no probability."""
    change: float
    """‖base − trained‖ / ‖trained‖: how far training moved the model."""
    kept: float
    """Share of that movement which is in the export: (found − base) · (trained − base) / ‖trained − base‖²; 1 if nothing
    was trained."""
    rows: tuple[int, ...]
    """Numbers of the reference's rows that were compared."""
    answers: tuple[str, ...]
    """Their generated answers."""


def measure(request: Request) -> Measured:
    """Loads the export and runs it.

    Args:
        request: What to load.

    Raises:
        ExportError: It does not load, whole and without leftovers.
    """
    reference_dir = Path(request.reference_dir)
    reference = Reference.read(reference_dir)
    rows = first_rows(Path(request.dataset_dir), reference.split, len(reference.ids))
    tensors = load_file(reference_dir / TENSORS_FILE)
    sums = dict.fromkeys(("error", "change", "inner", "trained"), 0.0)
    if request.kind == "gguf":
        # llama.cpp is handed images only.
        numbers = [number for number, row in enumerate(rows) if len(_stills(row)) == len(row.images)]
        if not numbers:
            raise ExportError(
                "each of the held-out rows has a video, and llama.cpp is only handed images here; set export.verify to false"
            )
    else:
        numbers = list(range(len(rows)))
    opened = _in_llama_cpp if request.kind == "gguf" else _in_transformers
    answers = []
    with opened(request, rows, reference.max_new_tokens) as run:
        for number in numbers:
            tuned, base = (_centred(tensors[f"{which}.{number}"]) for which in ("tuned", "base"))
            found = _centred(run.logits(rows[number]))
            if found.shape != tuned.shape:
                raise ExportError(
                    f"the exported model gives logits of shape {list(found.shape)}, the trained one {list(tuned.shape)};"
                    " please report this with the model's name"
                )
            sums["error"] += float((found - tuned).square().sum())
            sums["change"] += float((base - tuned).square().sum())
            sums["inner"] += float(((found - base) * (tuned - base)).sum())
            sums["trained"] += float(tuned.square().sum())
            answers.append(run.answer(rows[number]))
    trained = max(sums["trained"], torch.finfo(torch.float64).tiny)
    return Measured(
        distance=(sums["error"] / trained) ** 0.5,
        change=(sums["change"] / trained) ** 0.5,
        kept=sums["inner"] / sums["change"] if sums["change"] else 1.0,
        rows=tuple(numbers),
        answers=tuple(answers),
    )


@dataclass(frozen=True)
class _Run:
    """An export that runs."""

    logits: Callable[[PreparedRow], torch.Tensor]
    """As `answer_logits` gives them."""
    answer: Callable[[PreparedRow], str]
    """The answer to a row."""


def _stills(row: PreparedRow) -> list[np.ndarray]:
    """A row's images, without its videos."""
    return [image for image in row.images if not isinstance(image, Video)]


@contextmanager
def _in_transformers(request: Request, rows: Sequence[PreparedRow], max_new_tokens: int) -> Iterator[_Run]:
    model, processing = load_export(request)
    with generating(model):
        yield _Run(
            logits=lambda row: answer_logits(model, processing, row),
            answer=lambda row: answers_alone(model, processing, [row], max_new_tokens)[0],
        )


@contextmanager
def _in_llama_cpp(request: Request, rows: Sequence[PreparedRow], max_new_tokens: int) -> Iterator[_Run]:
    from vlm.export.gguf.llama import LlamaCpp

    processing = Processing.from_dir(Path(request.checkpoint_dir) / "processor")
    layout = check_supported(processing.family)
    longest = max(len(row.input_ids) for row in rows) + max_new_tokens
    model = LlamaCpp(Path(request.export_dir), layout, processing, longest, request.device)

    def logits(row: PreparedRow) -> torch.Tensor:
        start, end = answer_positions(row)
        return model.logits(row.messages, _stills(row), row.input_ids.tolist()[:end], start)[0]

    def answer(row: PreparedRow) -> str:
        messages, num_images = prompt_of(row)
        return model.answer(messages, _stills(row)[:num_images], max_new_tokens)

    try:
        yield _Run(logits, answer)
    finally:
        model.close()


def load_export(request: Request) -> tuple[Any, Processing]:
    """The exported model in evaluation mode, and the export's own processor.

    Args:
        request: What to load.

    Raises:
        ExportError: It does not load, whole and without leftovers.
    """
    from vlm.loading.checkpoint import progress_where_seen
    from vlm.loading.quantization import make_trainable

    export_dir = Path(request.export_dir)
    processing = Processing.from_dir(export_dir)
    description = json.loads((Path(request.checkpoint_dir) / "checkpoint.json").read_text(encoding="utf-8"))
    dtype = torch.float32 if request.device == "cpu" else getattr(torch, description["dtype"])
    with progress_where_seen():
        if request.kind == "lora":
            model = _load(Path(request.checkpoint_dir) / "model", dtype, request.device)
            inner, model = model, _with_adapter(model, export_dir)
        else:
            inner = model = _load(export_dir, dtype, request.device)
    make_trainable(inner, dtype)
    if processing.family.prepare_model is not None:
        processing.family.prepare_model(inner)
    return model.eval(), processing


def _load(folder: Path, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForImageTextToText

    def load(device_map: Any) -> Any:
        return AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, device_map=device_map, local_files_only=True, output_loading_info=True
        )

    try:
        model, report = load({"": "cpu" if device == "cpu" else torch.cuda.current_device()})
    except torch.OutOfMemoryError:
        # A 16-bit model may be larger than the quantised one that was trained; the rest goes to the host's memory.
        torch.cuda.empty_cache()
        model, report = load("auto")
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise ExportError(
                f"transformers finds {len(report[what])} {what.replace('_', ' ')} in the export, such as"
                f" {sorted(map(str, report[what]))[0]!r}; please report this with the model's name"
            )
    return model


def _with_adapter(model: Any, export_dir: Path) -> Any:
    import warnings

    import peft

    with warnings.catch_warnings():
        # peft asks under a name that transformers renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.PeftModel.from_pretrained(model, str(export_dir))


def _centred(logits: torch.Tensor) -> torch.Tensor:
    """In double precision, each position's mean taken off."""
    logits = logits.double()
    return logits - logits.mean(dim=-1, keepdim=True)


def main(arguments: list[str]) -> int:
    """Measures what a request file asks for.

    Args:
        arguments: Paths of the request and of the result, which holds what was measured, or the error.
    """
    request_path, result_path = map(Path, arguments)
    try:
        result: dict[str, Any] = {
            "measured": asdict(measure(Request(**json.loads(request_path.read_text(encoding="utf-8")))))
        }
    except (VlmError, OSError, ValueError, RuntimeError) as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    result_path.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
