"""The root of the configuration tree."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlm.config.base import Section
from vlm.config.data import DataConfig
from vlm.config.evaluation import EvaluationConfig, ExportConfig, GenerationConfig
from vlm.config.model import LoraConfig, ModelConfig
from vlm.config.training import TrainingConfig


class TrackingConfig(Section):
    """Where runs are logged."""

    enabled: bool = Field(True, description="Log to MLflow.")
    uri: str | None = Field(None, description="MLflow tracking address; None is a SQLite file beside the store.")
    experiment: str = Field("vision-finetune", min_length=1, description="MLflow experiment.")
    registered_model: str | None = Field(
        None,
        min_length=1,
        pattern=r"^[\w .-]+$",
        description="Registers every run as a version of this model in MLflow's registry; the alias 'champion' moves to it"
        " where the leading metric is significantly better on the rows that both answered. None registers nothing.",
    )

    @model_validator(mode="after")
    def _registry_is_part_of_tracking(self) -> TrackingConfig:
        if self.registered_model is not None and not self.enabled:
            raise ValueError(
                f"registered_model {self.registered_model!r} has no effect while tracking is off; set tracking.enabled to true"
                " or drop it"
            )
        return self


class RuntimeConfig(Section):
    """Where things run and are kept. Nothing here changes a result, so nothing here is in a key, except the device's effect on 'auto' settings."""

    store: str = Field(
        "runs/store", min_length=1, description="fsspec address of the artifact store (file, memory, s3, gs, …)."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="'auto' takes the first GPU that is there.")
    num_workers: int | None = Field(
        None,
        ge=0,
        le=4096,
        description="Threads that decode images in step 3; None takes one per core, or a single one in each of several processes.",
    )


class RunConfig(Section):
    """Everything one run of the pipeline needs; without any setting it runs the built-in model on the built-in data."""

    model: ModelConfig = Field(ModelConfig(), description="Step 1: the model.")
    lora: LoraConfig = Field(LoraConfig(), description="Step 2: the adapter.")
    data: DataConfig = Field(DataConfig(), description="Step 3: the dataset.")
    training: TrainingConfig = Field(TrainingConfig(), description="Steps 4 and 5: the plan and the training.")
    generation: GenerationConfig = Field(
        GenerationConfig(), description="Step 6: answers of the tuned and the base model."
    )
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="Step 7: metrics.")
    export: ExportConfig = Field(ExportConfig(), description="Step 7: what is written for use elsewhere.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Experiment tracking.")
    runtime: RuntimeConfig = Field(RuntimeConfig(), description="Where things run and are kept.")

    @model_validator(mode="after")
    def _full_finetuning_is_possible(self) -> RunConfig:
        if not self.lora.full_finetuning:
            return self
        if self.model.quantization not in ("auto", "none"):
            raise ValueError(
                f"lora.full_finetuning trains the weights themselves, which model.quantization {self.model.quantization!r}"
                " takes away; set model.quantization to 'none' (or 'auto')"
            )
        if "lora" in self.export.types:
            raise ValueError(
                "export.types has 'lora' but lora.full_finetuning makes no adapter; set export.types to ['merged_16bit'] or another"
                " whole model, or []"
            )
        return self

    @model_validator(mode="after")
    def _model_can_be_spread(self) -> RunConfig:
        if self.training.distributed.strategy != "fsdp2":
            return self
        if self.model.quantization == "int8":
            raise ValueError(
                "model.quantization 'int8' cannot be spread over GPUs by training.distributed.strategy 'fsdp2'; set it to 'nf4' or"
                " 'none', or the strategy to 'ddp'"
            )
        if self.lora.use_dora and self.model.quantization != "none":
            raise ValueError(
                f"lora.use_dora over model.quantization {self.model.quantization!r} reads whole 4-bit weights, which"
                " training.distributed.strategy 'fsdp2' takes apart; set model.quantization to 'none', or the strategy to 'ddp'"
            )
        if "language" in self.lora.full_finetuning and self.training.optimizer != "adamw":
            raise ValueError(
                f"training.optimizer {self.training.optimizer!r} may be 8-bit AdamW, whose blocks do not follow the slices that"
                " training.distributed.strategy 'fsdp2' cuts trained weights into; set training.optimizer to 'adamw'"
            )
        return self
