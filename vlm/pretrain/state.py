"""Checkpoints of the pretraining: weights, the optimiser's averages and where it stands, as safetensors and JSON."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vlm.config.pretrain import PretrainConfig
from vlm.training import checkpoints

_WEIGHTS, _AVERAGES, _PROGRESS = "weights.safetensors", "optimizer.safetensors", "progress.json"
# What may differ between the runs of one training.
_OF_A_RUN = {
    "run_minutes", "num_workers", "log_every_steps", "checkpoint_minutes", "rows_per_kind", "real_data", "work_dir", "output_dir",
}  # fmt: skip


@dataclass
class Progress:
    """How far the training is.

    Attributes:
        step: Finished optimiser steps.
        seconds: Spent on them, over all runs.
        num_lines: Lines trained on, repetitions counted.
        num_tokens: Supervised tokens trained on, likewise.
        device: What the last run ran on.
        num_runs: Runs so far.
        history: Logged figures.
    """

    step: int = 0
    seconds: float = 0.0
    num_lines: int = 0
    num_tokens: int = 0
    device: str = ""
    num_runs: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def identity(config: PretrainConfig) -> str:
    """Names a training by the settings that decide its course."""
    return checkpoints.training_identity({"config": config.model_dump_json(exclude=_OF_A_RUN)})


def save(folder: Path, progress: Progress, model: torch.nn.Module, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Writes a checkpoint and removes the older ones once it is complete.

    Args:
        folder: Of all checkpoints.
        progress: How far the training is.
        model: The model.
        optimizer: AdamW over its parameters.
        name: The training's identity.
    """
    own = folder / f"checkpoint-{progress.step}"
    if own.exists():
        shutil.rmtree(own)
    own.mkdir(parents=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in model.named_parameters()}
    averages = {
        f"{key}:{entry}": value.detach().cpu().contiguous()
        for key, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(weights, own / _WEIGHTS)
    save_file(averages, own / _AVERAGES)
    (own / _PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
    checkpoints.mark_complete(own, progress.step, name)
    checkpoints.remove_others(folder, own)


def newest(folder: Path, name: str) -> tuple[Path, Progress] | None:
    """The checkpoint to go on from.

    Args:
        folder: Of all checkpoints.
        name: The training's identity.

    Returns:
        Its folder and how far the training was; None where there is none.
    """
    found = checkpoints.newest_complete(folder, name)
    if found is None:
        return None
    content: dict[str, Any] = json.loads((found[1] / _PROGRESS).read_text(encoding="utf-8"))
    return found[1], Progress(**content)


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Puts a checkpoint's weights into a model of the same shape."""
    stored = load_file(folder / _WEIGHTS)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(stored.pop(key))
    assert not stored, "the same training has the same parameters"


def load_averages(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the optimiser's averages back."""
    parameters = dict(model.named_parameters())
    for key, value in load_file(folder / _AVERAGES).items():
        name, entry = key.rsplit(":", 1)
        parameter = parameters[name]
        # The count of steps stays where the optimiser keeps it: beside the parameter only where it is fused.
        place = "cpu" if entry == "step" and not optimizer.defaults.get("fused") else parameter.device
        optimizer.state[parameter][entry] = value.to(place)
