"""What every process of a training is told: a JSON file with folders and settings. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.config import EvaluationConfig, GenerationConfig, TrainingConfig


@dataclass(frozen=True)
class Job:
    """One training, as `vlm.training.train.train_adapter` takes it.

    Attributes:
        checkpoint_dir: The base model.
        digest: Of the base model's checkpoint, where known.
        adapter_dir: The initial adapter.
        dataset_dir: Prepared dataset.
        plan_dir: The plan.
        output_dir: Receives what was trained; process 0 writes it.
        work_dir: Keeps checkpoints between runs.
        events_dir: Where the processes of this machine tell what happens.
        device: ``cpu`` or ``cuda``.
        num_processes: Of this machine.
        training: Settings.
        generation: How rows are answered during training.
        evaluation: How those answers are scored.
    """

    checkpoint_dir: Path
    digest: str | None
    adapter_dir: Path
    dataset_dir: Path
    plan_dir: Path
    output_dir: Path
    work_dir: Path
    events_dir: Path
    device: str
    num_processes: int
    training: TrainingConfig
    generation: GenerationConfig
    evaluation: EvaluationConfig

    def write(self, path: Path) -> None:
        """Writes the file.

        Args:
            path: Of the file.
        """
        content: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, Path):
                value = str(value.absolute())
            elif isinstance(value, TrainingConfig | GenerationConfig | EvaluationConfig):
                value = value.model_dump(mode="json")
            content[name] = value
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        """Reads the file.

        Args:
            path: Of the file.
        """
        content = json.loads(path.read_text(encoding="utf-8"))
        for name in content:
            if name.endswith("_dir"):
                content[name] = Path(content[name])
        content["training"] = TrainingConfig.model_validate(content["training"])
        content["generation"] = GenerationConfig.model_validate(content["generation"])
        content["evaluation"] = EvaluationConfig.model_validate(content["evaluation"])
        return cls(**content)
