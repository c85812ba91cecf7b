"""Settings of the built-in model's pretraining."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlm.config.base import MAX_SEED, Section

_WIDTH = "a multiple of 64, the size of an attention head"


class ArchitectureConfig(Section):
    """Sizes of the model."""

    vision_layers: int = Field(
        6, ge=2, description="Layers of the vision tower; every second one sees the whole image."
    )
    vision_width: int = Field(256, ge=64, multiple_of=64, description=f"Width of the vision tower, {_WIDTH}.")
    vision_mlp_width: int = Field(640, ge=64, multiple_of=64, description="Width of its feed-forward blocks.")
    language_layers: int = Field(6, ge=1, description="Layers of the language model.")
    language_width: int = Field(
        256,
        ge=128,
        multiple_of=128,
        description="Width of the language model, in heads of 64, of which two share keys.",
    )
    language_mlp_width: int = Field(768, ge=64, multiple_of=64, description="Width of its feed-forward blocks.")


class CurriculumConfig(Section):
    """How the lines grow harder. Shares are of the whole training."""

    first_longest: int = Field(5, ge=1, description="Most characters of a line at the beginning.")
    last_longest: int = Field(52, ge=1, description="Most characters of a line once it is over.")
    first_figures: float = Field(
        0.6,
        ge=0,
        le=1,
        description="Share of lines of digits alone at the beginning, which falls to none: on ten shapes a model finds out sooner"
        " where to look.",
    )
    start: float = Field(
        0.08,
        ge=0,
        le=1,
        description="Share after which lines begin to grow: until then the model finds out that it can see.",
    )
    end: float = Field(0.35, gt=0, le=1, description="Share after which lines have their full length and wear.")
    easy_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of easier lines that stay in the mix, of any difficulty up to the present one.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> CurriculumConfig:
        if self.end <= self.start:
            raise ValueError(f"curriculum.end {self.end} is not after curriculum.start {self.start}; raise it")
        if self.last_longest < self.first_longest:
            raise ValueError(
                f"curriculum.last_longest {self.last_longest} is below first_longest {self.first_longest}; raise it"
            )
        return self


class PretrainConfig(Section):
    """The pretraining of the built-in model, from random weights to a measured checkpoint."""

    architecture: ArchitectureConfig = Field(ArchitectureConfig(), description="The model.")
    curriculum: CurriculumConfig = Field(CurriculumConfig(), description="The order of the lines.")
    num_steps: int | None = Field(
        None,
        ge=1,
        description="Optimiser steps of the whole training, which is then the same wherever it runs; None trains for `minutes`.",
    )
    minutes: float = Field(
        16.0,
        gt=0,
        description="Length of the whole training, over all runs, where `num_steps` is None. Steps differ from machine to machine then.",
    )
    run_minutes: float = Field(
        9.0,
        gt=0,
        description="A run that has taken so long, start-up included, writes a checkpoint and ends; the next one goes on from there.",
    )
    positions_per_step: int = Field(
        65_536,
        ge=1024,
        description="Size of an optimiser step: patches of the vision tower and tokens of the language model together.",
    )
    uses_per_pack: int = Field(
        2,
        ge=1,
        le=8,
        description="How often a drawn pack is trained on, each time with another grain and contrast: drawing is slower than training.",
    )
    learning_rate: float = Field(1e-3, gt=0, le=1, description="Peak learning rate.")
    warmup_steps: int = Field(400, ge=1, description="Steps in which the learning rate rises.")
    final_rate: float = Field(
        0.01, gt=0, le=1, description="Share of the peak learning rate at the end; it falls as a cosine."
    )
    weight_decay: float = Field(0.05, ge=0, description="AdamW's decoupled weight decay, of matrices only.")
    beta2: float = Field(0.98, gt=0, lt=1, description="AdamW's decay of squared gradients.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Of the first weights and of all that is drawn.")
    num_workers: int | None = Field(
        None, ge=0, description="Processes that draw; None takes one per core but two, 0 draws in the training's own."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="'auto' takes the first GPU that is there.")
    log_every_steps: int = Field(50, ge=1, description="Steps between two lines of the log.")
    checkpoint_minutes: float = Field(
        2.5, gt=0, description="Minutes between two checkpoints from which an interrupted run resumes."
    )
    rows_per_kind: int = Field(
        100, ge=1, description="Drawn lines of each kind of text on which the result is measured."
    )
    real_data: tuple[str, ...] = Field(
        (),
        description="Parquet files with columns image, prompt and text on which the result is measured, and never trained.",
    )
    work_dir: str = Field("runs/pretrain", min_length=1, description="Keeps checkpoints and the log between runs.")
    output_dir: str = Field(
        "runs/pretrain/model", min_length=1, description="Receives the finished model with its card."
    )
