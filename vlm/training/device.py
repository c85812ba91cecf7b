"""Which training settings a device cannot serve. Imports nothing heavy: this is asked before anything is built."""

from __future__ import annotations

from typing import Literal

from vlm.config import TrainingConfig
from vlm.errors import ConfigError, ResourceError
from vlm.loading.device import count_gpus


def check_device(training: TrainingConfig, device: str) -> None:
    """Refuses settings that need a GPU where there is none.

    Args:
        training: Settings.
        device: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: 8-bit AdamW, which has no kernels for a CPU, or memory to move away where it is the same memory.
        ResourceError: More processes than GPUs.
    """
    num_local_processes(training.distributed.num_processes, device, "training.distributed.num_processes")
    if device != "cpu":
        return
    if training.optimizer == "adamw_8bit":
        raise ConfigError("training.optimizer 'adamw_8bit' needs a GPU; set it to 'auto' or 'adamw'")
    if training.activation_memory == "offload":
        raise ConfigError("training.activation_memory 'offload' needs a GPU; set it to 'auto' or 'recompute'")


def num_local_processes(asked: int | Literal["auto"], device: str, name: str) -> int:
    """How many processes of this machine work, ``auto`` settled.

    Args:
        asked: The setting.
        device: ``cpu`` or ``cuda``.
        name: Of the setting.

    Returns:
        One per GPU for ``auto``, and one on a CPU.

    Raises:
        ResourceError: More processes than GPUs.
    """
    if device == "cpu" or asked == 1:
        return 1 if asked == "auto" else asked
    there = count_gpus()
    if asked == "auto":
        return there
    if asked > there:
        raise ResourceError(
            f"{name} is {asked} but this machine shows {there} GPU{'s' * (there != 1)}; lower it or set it to 'auto'"
        )
    return asked
