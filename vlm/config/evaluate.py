"""Settings of an evaluation without training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlm.config.base import Section
from vlm.config.data import DataConfig
from vlm.config.evaluation import EvaluationConfig, GenerationConfig
from vlm.config.model import ModelConfig
from vlm.config.run import RuntimeConfig, TrackingConfig

SubjectKind = Literal["adapter", "model", "predictions"]


class SubjectConfig(Section):
    """What is scored."""

    path: str = Field(
        min_length=1,
        description="Adapter folder, export folder, checkpoint folder or Hub name of a whole model, or predictions file"
        " (JSON lines with `id` and `prediction`). Adapters and predictions may lie on any fsspec address.",
    )
    kind: Literal["auto", SubjectKind] = Field("auto", description="'auto' goes by the files that are there.")
    targets: Literal["dataset", "file"] = Field(
        "dataset",
        description="Where the expected answers to a predictions file are: in the prepared dataset, matched by `id`, or in"
        " the file's own `target`; then neither model nor dataset is used.",
    )

    @model_validator(mode="after")
    def _targets_of_predictions(self) -> SubjectConfig:
        if self.targets == "file" and self.kind not in ("auto", "predictions"):
            raise ValueError(
                f"targets 'file' is for a predictions file, but kind is {self.kind!r}; drop one of the two"
            )
        return self


class EvaluateConfig(Section):
    """Everything one evaluation needs besides a dataset: what to score, and the base model it belongs to."""

    subject: SubjectConfig = Field(description="What is scored.")
    model: ModelConfig = Field(
        ModelConfig(), description="The base model: an adapter is put on it, and any subject is compared with it."
    )
    data: DataConfig = Field(DataConfig(), description="The dataset.")
    generation: GenerationConfig = Field(GenerationConfig(), description="Answers of the subject and the base model.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="Metrics.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Experiment tracking.")
    runtime: RuntimeConfig = Field(RuntimeConfig(), description="Where things run and are kept.")
