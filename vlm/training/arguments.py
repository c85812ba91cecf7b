"""The settings of a training as TRL's ``SFTConfig``. Loads trl."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl import SFTConfig

from vlm.config import TrainingConfig
from vlm.config.training import LEARNING_RATE
from vlm.training.plan import PlanSummary

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
_OPTIMIZERS = {
    ("adamw", "cpu"): "adamw_torch",
    ("adamw", "cuda"): "adamw_torch_fused",
    ("adamw_8bit", "cuda"): "adamw_8bit",
}
# A worker makes a step of eight pages in a fraction of the time that a GPU takes for it; more would only hold memory.
_MOST_WORKERS = 4
# Steps that each worker is ahead, for unequal ones.
_STEPS_AHEAD = 4


def training_arguments(
    training: TrainingConfig, plan: PlanSummary, work_dir: Path, report_to: Sequence[str]
) -> SFTConfig:
    """Translates the settings.

    Args:
        training: Settings.
        plan: Number of steps, device, precision and optimiser.
        work_dir: Receives checkpoints.
        report_to: Names of transformers' own integrations.
    """
    on_gpu = plan.device == "cuda"
    evaluates = training.evaluate_every_steps is not None and plan.num_validation_rows > 0
    name = "activation_checkpointing" if hasattr(SFTConfig, "activation_checkpointing") else "gradient_checkpointing"
    settings: dict[str, Any] = dict(
        output_dir=str(work_dir),
        max_steps=plan.num_steps,
        num_train_epochs=1,
        # One item is one planned step with all its micro-batches, however many.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=training.learning_rate or LEARNING_RATE,
        lr_scheduler_type=_SCHEDULES[training.schedule],
        warmup_steps=round(training.warmup_fraction * plan.num_steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=_OPTIMIZERS[plan.optimizer, plan.device],
        # Switched on by us, see `vlm.training.recompute`. transformers renamed the setting after 5.17.
        **{name: False},
        bf16=on_gpu and plan.dtype == "bfloat16",
        fp16=on_gpu and plan.dtype == "float16",
        use_cpu=not on_gpu,
        seed=training.seed,
        logging_steps=training.log_every_steps,
        logging_first_step=True,
        # A loss that is no number is an error here, not something to smooth over.
        logging_nan_inf_filter=False,
        # One that is asked for, since the run is interrupted, is written in any case.
        save_strategy="no" if training.checkpoint_every_steps is None else "steps",
        save_steps=training.checkpoint_every_steps or 1,
        # Old checkpoints go only after the new one is complete, see `_save_checkpoint`.
        save_total_limit=None,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=training.evaluate_every_steps if evaluates else None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        padding_free=False,
        # They live as long as the training: all its steps are one epoch.
        dataloader_num_workers=num_workers() if on_gpu else 0,
        dataloader_prefetch_factor=_STEPS_AHEAD if on_gpu else None,
        dataloader_pin_memory=on_gpu,
        # Else the host would wait for all work of the last step before it begins to prepare the next.
        accelerator_config={"non_blocking": on_gpu},
        report_to=list(report_to) or "none",
        disable_tqdm=True,
    )
    arguments = SFTConfig(**settings)
    # Where there are more GPUs than this process uses, the stock trainer would spread a model over all of them.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def num_workers() -> int:
    """Processes that make batches for one GPU: one core is left to each training process of this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // processes - 1))
