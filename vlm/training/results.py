"""What a training leaves behind beside the adapter: its curve and its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.summary import Summary

METRICS_FILE = "metrics.jsonl"
# Of figures from rounds of answers; the rest of a name is the metric's.
ROUND_PREFIX = "generated_"
SUMMARY_FILE = "training.json"


@dataclass(frozen=True)
class TrainingSummary(Summary):
    """The content of ``training.json``."""

    num_steps: int
    """Optimiser steps of the whole training, fewer than planned where it stopped early."""
    stopped_early: bool
    """Whether `early_stopping_patience` ended it."""
    best_step: int | None
    """The step that the adapter is from, where the best one was kept; None for the last."""
    best_value: float | None
    """The best adapter's value of what `keep_best` names."""
    resumed_from_step: int | None
    """The step after which this run took over from a checkpoint; None for a training in one piece."""
    final_loss: float | None
    """The last logged training loss."""
    validation_loss: float | None
    """Loss per supervised token on the validation split, at the end; None without validation rows."""
    wall_seconds: float
    """Of this run, validation and checkpoints included."""
    tokens_per_second: float | None
    """Median over the logged stretches of this run."""
    samples_per_second: float | None
    """Median over the logged stretches of this run."""
    data_wait_share: float | None
    """Share of the time in which the training waited for its next batch, from 0 to 1: median over the logged stretches of
    this run. Well above 0, images and not the model set the pace."""
    peak_memory_bytes: int | None
    """Most GPU memory that PyTorch held at once; None on a CPU."""
    parameters_without_gradient: list[str]
    """Names of trained tensors that no row of the training reached, so that they are as before: those of a vision tower
    where no row has an image, or what a model keeps for larger images than the dataset's."""


def write_results(
    history: Sequence[dict[str, Any]],
    output_dir: Path | None,
    *,
    num_steps: int,
    resumed_from_step: int | None,
    wall_seconds: float,
    device: str,
    parameters_without_gradient: Sequence[str],
    stopped_early: bool = False,
    best_step: int | None = None,
    best_value: float | None = None,
) -> TrainingSummary:
    """Writes ``metrics.jsonl`` and ``training.json``.

    Args:
        history: The trainer's `state.log_history`.
        output_dir: An existing folder; None writes nothing.
        num_steps: Of the whole training.
        resumed_from_step: Where this run took over, or None.
        wall_seconds: Of this run.
        device: ``cpu`` or ``cuda``.
        parameters_without_gradient: Names of trained tensors that never had one.
        stopped_early: Whether patience ended it.
        best_step: The step of the kept adapter, or None for the last.
        best_value: What made it the best.
    """
    lines = history_lines(history)
    if output_dir is not None:
        with (output_dir / METRICS_FILE).open("w", encoding="utf-8", newline="\n") as handle:
            for line in lines:
                handle.write(json.dumps(line, sort_keys=True) + "\n")

    def last(name: str) -> float | None:
        return next((line[name] for line in reversed(lines) if name in line), None)

    def median(name: str) -> float | None:
        values = [line[name] for line in lines if name in line and line["step"] > (resumed_from_step or 0)]
        return round(float(np.median(values)), 3) if values else None

    peak = None
    if device == "cuda":
        import torch

        peak = int(torch.cuda.max_memory_allocated())
    summary = TrainingSummary(
        num_steps=num_steps,
        stopped_early=stopped_early,
        best_step=best_step,
        best_value=best_value,
        resumed_from_step=resumed_from_step,
        final_loss=last("loss"),
        validation_loss=last("eval_loss"),
        wall_seconds=round(wall_seconds, 3),
        tokens_per_second=median("tokens_per_second"),
        samples_per_second=median("samples_per_second"),
        data_wait_share=median("data_wait_share"),
        peak_memory_bytes=peak,
        parameters_without_gradient=sorted(parameters_without_gradient),
    )
    if output_dir is not None:
        text = json.dumps(summary.to_json(), indent=2, sort_keys=True) + "\n"
        (output_dir / SUMMARY_FILE).write_text(text, encoding="utf-8", newline="\n")
    return summary


def read_summary(training_dir: Path) -> TrainingSummary:
    """Reads ``training.json``.

    Args:
        training_dir: Folder that it lies in.
    """
    return TrainingSummary(**json.loads((training_dir / SUMMARY_FILE).read_text(encoding="utf-8")))


def history_lines(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The trainer's log as the lines of ``metrics.jsonl``.

    Args:
        history: `state.log_history`.

    Returns:
        Entries with `step` and `loss` (with learning rate, gradient norm and pace), `eval_loss`, or the figures of a round
        of answers, whose names start with ``generated_``.
    """
    kept = (
        "loss",
        "eval_loss",
        "learning_rate",
        "grad_norm",
        "mean_token_accuracy",
        "tokens_per_second",
        "samples_per_second",
        "data_wait_share",
    )
    lines = []
    for entry in history:
        figures = {name: entry[name] for name in kept if name in entry}
        figures |= {name: value for name, value in entry.items() if name.startswith(ROUND_PREFIX)}
        if "loss" in entry or "eval_loss" in entry or any(name.startswith(ROUND_PREFIX) for name in entry):
            lines.append({"step": entry["step"], **figures})
    return lines
