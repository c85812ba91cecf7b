"""Whether a training's files fit on the disk, asked before it begins. No torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from vlm.config import TrainingConfig
from vlm.errors import ResourceError
from vlm.training.memory import OPTIMIZER_BYTES
from vlm.training.plan import read_plan

_WEIGHT_BYTES = 4


def check_disk(adapter_dir: Path, plan_dir: Path, training: TrainingConfig, work_dir: Path, output_dir: Path) -> None:
    """Refuses a training whose checkpoints and result do not fit, which it would otherwise find out hours later.

    Args:
        adapter_dir: The initial adapter.
        plan_dir: The plan.
        training: Settings.
        work_dir: Existing folder of the checkpoints; those in it will make room for new ones.
        output_dir: Existing folder of the result.

    Raises:
        ResourceError: Too little is free.
    """
    plan = read_plan(plan_dir)
    num_trained = json.loads((adapter_dir / "targets.json").read_text(encoding="utf-8"))["num_trainable_parameters"]
    result = num_trained * _WEIGHT_BYTES
    checkpoint = result + int(num_trained * OPTIMIZER_BYTES[plan.optimizer])
    best = 0 if training.keep_best == "none" else result
    every = training.checkpoint_every_steps
    # A new one is complete before the old one goes; the last one waits until the result is there.
    at_once = 0 if every is None else 1 if plan.num_steps <= every else 2
    # The best so far, and the one that it replaces or that an older checkpoint holds.
    kept = at_once * checkpoint + 2 * best
    held = sum(path.stat().st_size for path in work_dir.rglob("*") if path.is_file())
    same_disk = work_dir.stat().st_dev == output_dir.stat().st_dev
    ends_with = min(at_once, 1) * checkpoint + best + result
    needs = [(work_dir, max(kept, ends_with) if same_disk else kept, held)]
    if not same_disk:
        needs.append((output_dir, result, 0))
    for folder, needed, there in needs:
        free = shutil.disk_usage(folder).free + there
        if needed > free:
            raise ResourceError(
                f"the disk of {folder.parent} has {free / 1e9:.2f} GB free but this training will hold up to {needed / 1e9:.2f} GB"
                f" there ({checkpoint / 1e9:.2f} a checkpoint, {result / 1e9:.2f} the result); free some, put runtime.store on a"
                " larger disk, or set training.checkpoint_every_steps to null for no checkpoints but of an interrupted run"
            )
