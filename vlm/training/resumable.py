"""How a training is saved and taken up again: the part of the trainer that knows of checkpoints.

They hold the adapter's tensors only, or those that are trained whole, are read back by our strict loader, and count when
complete. Of several processes the first one writes, in a form from which any number of processes goes on.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from trl import SFTTrainer

from vlm.lora.peft_model import WEIGHTS_FILE, load_tensors, save_tensors
from vlm.training import checkpoints
from vlm.training.best import KeepBest
from vlm.training.callbacks import Pace
from vlm.training.distributed.ranks import Ranks
from vlm.training.flat import FlatParameters

if TYPE_CHECKING:
    from vlm.training.distributed.sharding import LocalShards, Sharded


class ResumableTrainer(SFTTrainer):
    """Saves and loads what `vlm.training.trainer.AdapterTrainer` trains, which sets these fields."""

    _peft_model: Any
    _identity: str
    _work_dir: Path
    _pace: Pace
    _best: KeepBest | None
    _ranks: Ranks | None
    _sharded: Sharded | None
    _shards: LocalShards | None = None
    """The optimiser's slices, where what is spread learns itself."""
    _flat: FlatParameters | None = None
    """What the optimiser works on, where that is slices of long tensors."""
    _gathered: tuple[dict[str, torch.Tensor], dict[str, Any] | None] | None = None
    """While a checkpoint of a spread model is written: its tensors, and its optimiser's state."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter's tensors."""
        folder = Path(output_dir) if output_dir else self._work_dir
        folder.mkdir(parents=True, exist_ok=True)
        if self._gathered is not None:
            save_file(self._gathered[0], folder / WEIGHTS_FILE, metadata={"format": "pt"})
        else:
            save_tensors(self._peft_model, folder / WEIGHTS_FILE)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._gathered is None or self._gathered[1] is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Not this process's slices: the form that a training on any number of processes resumes from.
        torch.save(self._gathered[1], Path(output_dir) / OPTIMIZER_NAME)
        assert self.lr_scheduler is not None
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._shards is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self._shards.load(torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True))
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def take_over(self, folder: Path) -> None:
        """Puts a training where a checkpoint left it, without going on.

        Args:
            folder: Of a complete checkpoint.
        """
        self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        # Its state tells which tensors never had a gradient.
        self.create_optimizer_and_scheduler(self.args.max_steps)
        self._load_optimizer_and_scheduler(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS_FILE
        if self._sharded is not None:
            self._sharded.load(path)
        else:
            load_tensors(self._peft_model, path)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        started = time.perf_counter()
        if self._ranks is not None and self._flat is not None:
            self._flat.merge(self._ranks.sum)
        if self._sharded is not None:
            self._gathered = (self._sharded.gathered(), None if self._shards is None else self._shards.gathered())
        if self._ranks is None or self._ranks.rank == 0:
            self._write_checkpoint(model, trial)
        self._gathered = None
        if self._ranks is not None:
            self._ranks.wait_for_first()
        self._pace.leave_out(time.perf_counter() - started)

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self._work_dir / f"checkpoint-{self.state.global_step}"
        if folder.exists():
            shutil.rmtree(folder)
        # Not SFTTrainer's own, which also writes a model card with every checkpoint.
        Trainer._save_checkpoint(self, model, trial)
        if self._best is not None:
            self._best.store(folder)
        checkpoints.mark_complete(folder, self.state.global_step, self._identity)
        checkpoints.remove_others(self._work_dir, keep=folder)
