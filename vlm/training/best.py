"""Keeps the best adapter of a training and says when to stop. Loads transformers.

The best tensors lie in one file beside the checkpoints. Every checkpoint holds a link to that file and the figures, so
that a resumed training compares with exactly what the interrupted one had.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vlm.config import TrainingConfig
from vlm.evaluation.metrics import METRICS
from vlm.training.results import ROUND_PREFIX

WEIGHTS_FILE = "best_adapter.safetensors"
STATE_FILE = "best.json"


@dataclass
class _State:
    """What a checkpoint remembers."""

    step: int | None = None
    value: float | None = None
    num_without_improvement: int = 0


class KeepBest(TrainerCallback):
    """Watches one figure and saves the adapter whenever it is as good as ever.

    Args:
        training: With `keep_best` and `early_stopping_patience`.
        work_dir: Receives the tensors.
        save: Writes the adapter's tensors to a file.
        writes: False in a process that leaves files to another; it calls `save` all the same.

    Attributes:
        figure: Name of the logged figure that is compared.
    """

    def __init__(
        self, training: TrainingConfig, work_dir: Path, save: Callable[[Path], None], *, writes: bool = True
    ) -> None:
        name = training.keep_best
        assert name != "none"
        self.figure = "eval_loss" if name == "loss" else ROUND_PREFIX + name
        self._lower = name == "loss" or METRICS[name].better == "lower"
        self._patience = training.early_stopping_patience
        self._path = work_dir / WEIGHTS_FILE
        self._save = save
        self._writes = writes
        self._state = _State()

    @property
    def step(self) -> int | None:
        """The step of the best adapter; None before the first comparison."""
        return self._state.step

    @property
    def value(self) -> float | None:
        """Its figure."""
        return self._state.value

    @property
    def is_exhausted(self) -> bool:
        """Whether patience has run out."""
        return self._patience is not None and self._state.num_without_improvement >= self._patience

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Compares, where the figure is among what is logged."""
        if self.figure in (logs or {}):
            assert logs is not None
            self._compare(state.global_step, float(logs[self.figure]))
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ends the training after a round of answers."""
        return self._stop(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ends the training after a validation loss."""
        return self._stop(control)

    def store(self, folder: Path) -> None:
        """Puts everything into a checkpoint.

        Args:
            folder: Of the checkpoint, not yet complete.
        """
        (folder / STATE_FILE).write_text(json.dumps(asdict(self._state)) + "\n", encoding="utf-8")
        if self._state.step is not None:
            # A file is only ever replaced, never written into, so that a link is as good as a copy.
            _link(self._path, folder / WEIGHTS_FILE)

    def restore(self, folder: Path) -> None:
        """Takes everything from a checkpoint.

        Args:
            folder: Of a complete checkpoint.
        """
        self._state = _State(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
        if self._state.step is not None and self._writes:
            self._path.unlink(missing_ok=True)
            _link(folder / WEIGHTS_FILE, self._path)

    def copy_to(self, path: Path) -> None:
        """Writes the best adapter.

        Args:
            path: Of the file.
        """
        shutil.copyfile(self._path, path)

    def _compare(self, step: int, value: float) -> None:
        best = self._state.value
        is_better = best is None or (value < best if self._lower else value > best)
        num_without_improvement = 0 if is_better else self._state.num_without_improvement + 1
        if not is_better and value != best:
            self._state.num_without_improvement = num_without_improvement
            return
        # Of equal ones the latest: a metric that is zero for long must not keep an adapter that learnt nothing.
        draft = self._path.with_name(f".{WEIGHTS_FILE}")
        self._save(draft)
        if self._writes:
            os.replace(draft, self._path)
        self._state = _State(step, value, num_without_improvement)

    def _stop(self, control: Any) -> Any:
        if self.is_exhausted:
            control.should_training_stop = True
        return control


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # file systems without links
        shutil.copyfile(source, target)
