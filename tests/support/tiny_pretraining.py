"""Settings of the built-in model's pretraining at its smallest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALLEST = {
    "vision_layers": 2,
    "vision_width": 64,
    "vision_mlp_width": 64,
    "language_layers": 1,
    "language_width": 128,
    "language_mlp_width": 64,
}


def smallest_settings(folder: Path) -> dict[str, Any]:
    """A training of seconds.

    Args:
        folder: Receives work and model.
    """
    return {
        "architecture": SMALLEST,
        "num_steps": 8,
        "positions_per_step": 1500,
        "warmup_steps": 2,
        "learning_rate": 3e-3,
        "log_every_steps": 1,
        "num_workers": 0,
        "device": "cpu",
        "rows_per_kind": 1,
        "work_dir": str(folder / "work"),
        "output_dir": str(folder / "model"),
    }
