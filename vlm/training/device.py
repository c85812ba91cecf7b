"""Which training settings a device cannot serve. Imports nothing heavy: this is asked before anything is built."""

from __future__ import annotations

from vlm.config import TrainingConfig
from vlm.errors import ConfigError


def check_device(training: TrainingConfig, device: str) -> None:
    """Refuses settings that need a GPU where there is none.

    Args:
        training: Settings.
        device: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: 8-bit AdamW, which has no kernels for a CPU, or memory to move away where it is the same memory.
    """
    if device != "cpu":
        return
    if training.optimizer == "adamw_8bit":
        raise ConfigError("training.optimizer 'adamw_8bit' needs a GPU; set it to 'auto' or 'adamw'")
    if training.activation_memory == "offload":
        raise ConfigError("training.activation_memory 'offload' needs a GPU; set it to 'auto' or 'recompute'")
