"""Settings of steps 4 and 5: the plan and the training."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from vlm.config.base import MAX_SEED, Section
from vlm.config.distributed import DistributedConfig
from vlm.config.evaluation import MetricName
from vlm.config.model import BUILTIN_MODEL

LEARNING_RATE, EPOCHS = 2e-4, 1.0
# A small model takes larger steps, and a few rows have to be seen more often.
_BUILTIN_LEARNING_RATE, _BUILTIN_EPOCHS = 2e-3, 3.0


class TrainingConfig(Section):
    """How the adapter is trained."""

    max_steps: int | None = Field(None, ge=1, description="Optimiser steps; None goes by `epochs`.")
    epochs: float | None = Field(
        None,
        gt=0,
        description="Passes over the training rows; None goes by `max_steps`. Both None means one epoch, and three"
        " for the built-in model.",
    )
    batch_size: int = Field(
        2,
        ge=1,
        le=1024,
        description="Conversations of one optimiser step are this times `gradient_accumulation`. Without packing, so many go"
        " into one forward and backward pass.",
    )
    gradient_accumulation: int = Field(
        4, ge=1, description="The other factor; without packing, the passes per optimiser step."
    )
    packing: bool = Field(
        True,
        description="Put the conversations of a step behind each other into as few rows as memory allows, without padding and"
        " without seeing each other; the result is the same to rounding. Families that cannot be packed use padded batches.",
    )
    max_tokens_per_pack: int | None = Field(
        None,
        ge=1,
        description="Most tokens of one packed row. None takes what GPU memory holds by estimate, and on a CPU `batch_size`"
        " times the longest conversation, or 1024 where that is less.",
    )
    tokens_per_step: int | None = Field(
        None,
        ge=1,
        description="Tokens of one optimiser step, which is then filled with as many conversations as fit, so that every step"
        " takes the same time; `batch_size` and `gradient_accumulation` have no say. Needs packing. None counts conversations.",
    )
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="Peak learning rate; None takes 2e-4, and 2e-3 for the built-in model."
    )
    vision_learning_rate: float | None = Field(
        None, gt=0, le=1, description="Peak learning rate of the vision tower; None takes `learning_rate`."
    )
    projector_learning_rate: float | None = Field(
        None, gt=0, le=1, description="Peak learning rate of the projector; None takes `learning_rate`."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="How the learning rate falls after the warm-up."
    )
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them as they are."
    )
    optimizer: Literal["auto", "adamw", "adamw_8bit"] = Field(
        "auto", description="'auto' is 8-bit AdamW on a GPU and plain AdamW on a CPU."
    )
    activation_memory: Literal["auto", "keep", "recompute", "offload"] = Field(
        "auto",
        description="What happens to a layer's activations until its backward pass: 'keep' is fastest; 'recompute' makes them"
        " again, for half as much time again; 'offload' also moves what is left to the host's memory, on a GPU, and with it an"
        " input embedding that does not learn and is not the head's, too. 'auto' moves that embedding first, then recomputes"
        " as few layers as the GPU's memory asks for, and on a CPU all of them where they would keep over 2 GiB.",
    )
    fused_kernels: bool = Field(
        True,
        description="Run LoRA layers, feed-forward blocks, norms and rotary embedding as fused pieces, which keep less"
        " memory and take fewer passes over it.",
    )
    cuda_graphs: bool = Field(
        True,
        description="On a GPU, replay the layers of steps that are too small to keep it busy as CUDA graphs. Steps of many"
        " tokens, dropout, activations in host memory, and cards without room for them go without.",
    )
    train_on_prompts: bool = Field(
        False, description="Put loss on the user's words too; off, only the assistant's words count."
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Of row order and dropout.")
    log_every_steps: int = Field(10, ge=1, description="Steps between two logged losses.")
    checkpoint_every_steps: int | None = Field(
        100,
        ge=1,
        description="Steps between two checkpoints from which an interrupted or killed run resumes; None writes one only when the"
        " run is interrupted.",
    )
    evaluate_every_steps: int | None = Field(
        None, ge=1, description="Steps between two validation losses; None evaluates at the end only."
    )
    generate_every_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between two rounds in which the model answers validation rows and is scored by the metrics of"
        " `evaluation`, under the limits of `generation`; the end is a round as well. None has no rounds.",
    )
    generate_max_rows: int = Field(
        32, ge=1, description="Rows of such a round, the same ones every time, spread evenly over the validation split."
    )
    # One Literal, not a union of two: forms show a union as alternatives of one name, and a literal as one list.
    keep_best: Literal["none", "loss", MetricName] = Field(
        "none",
        description="The trained adapter is the one with the best validation loss, or the best value of a metric in the rounds"
        " of `generate_every_steps`, of equal ones the latest; 'none' takes the last one.",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Ends the training when what `keep_best` names did not improve so many times in a row; None never does.",
    )
    distributed: DistributedConfig = Field(
        DistributedConfig(), description="Step 5 on several GPUs or machines; changes no result but for rounding."
    )

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, values: Any) -> Any:
        """Takes the yes or no that `activation_memory` used to be."""
        if isinstance(values, dict) and "gradient_checkpointing" in values:
            if "activation_memory" in values:
                raise ValueError(
                    "gradient_checkpointing is the older name of activation_memory; leave one of the two out"
                )
            values = dict(values)
            old = values.pop("gradient_checkpointing")
            if not isinstance(old, bool):
                raise ValueError(
                    f"gradient_checkpointing is {old!r}; write activation_memory 'recompute' for true and 'keep' for false"
                )
            values["activation_memory"] = "recompute" if old else "keep"
        return values

    @model_validator(mode="after")
    def _no_contradiction(self) -> TrainingConfig:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError(
                f"max_steps {self.max_steps} and epochs {self.epochs} both set the length of the training; give one of them"
            )
        if not self.packing and (self.max_tokens_per_pack or self.tokens_per_step):
            name = "max_tokens_per_pack" if self.max_tokens_per_pack else "tokens_per_step"
            raise ValueError(
                f"{name} {getattr(self, name)} has no effect without packing; leave it out or turn packing on"
            )
        if self.distributed.strategy == "fsdp2" and self.generate_every_steps is not None:
            raise ValueError(
                f"generate_every_steps {self.generate_every_steps} needs a whole model in every process, which"
                " distributed.strategy 'fsdp2' takes apart; leave it out, or set the strategy to 'ddp'"
            )
        if self.keep_best == "none":
            if self.early_stopping_patience is not None:
                raise ValueError(
                    f"early_stopping_patience {self.early_stopping_patience} has no effect without keep_best; set keep_best to"
                    " 'loss' or a metric"
                )
            return self
        rounds = "evaluate_every_steps" if self.keep_best == "loss" else "generate_every_steps"
        if getattr(self, rounds) is None:
            raise ValueError(
                f"keep_best {self.keep_best!r} compares values that only come with {rounds}; set it, or keep_best to 'none'"
            )
        return self

    def settled(self, model_name: str) -> TrainingConfig:
        """The same settings, with what the model decides filled in.

        Args:
            model_name: `ModelConfig.name`.
        """
        builtin = model_name == BUILTIN_MODEL
        filled: dict[str, float] = {}
        if self.learning_rate is None:
            filled["learning_rate"] = _BUILTIN_LEARNING_RATE if builtin else LEARNING_RATE
        if self.epochs is None and self.max_steps is None:
            filled["epochs"] = _BUILTIN_EPOCHS if builtin else EPOCHS
        return self.model_copy(update=filled)
