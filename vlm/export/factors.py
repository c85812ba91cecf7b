"""The updates that an adapter holds, read from its folder, and what they do to a weight. Loads torch and peft."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vlm.errors import ExportError
from vlm.lora.file_keys import PREFIX, key_of
from vlm.lora.peft_model import WEIGHTS_FILE, read_config


@dataclass(frozen=True)
class LoraFactors:
    """The update of one module, or of one 3-D parameter of routed experts, which adds a dimension in front of all shapes."""

    a: torch.Tensor
    """Tensor of shape [rank, inputs], or [experts, rank, inputs], float32."""
    b: torch.Tensor
    """Tensor of shape [outputs, rank], or [experts, outputs, rank], float32."""
    scale: float
    """``s``."""
    magnitude: torch.Tensor | None
    """DoRA's ``m``, tensor of shape [outputs], or None."""

    def merge(self, weight: torch.Tensor) -> torch.Tensor:
        """Folds the update into a weight.

        Args:
            weight: Tensor of shape [outputs, inputs] or [experts, outputs, inputs], float32.
        """
        a, b = self.a.to(weight.device), self.b.to(weight.device)
        merged = weight + self.scale * (b @ a)
        if self.magnitude is not None:
            merged *= (self.magnitude.to(weight.device) / merged.norm(dim=1))[:, None]
        return merged

    def apply(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The adapted layer's output without its bias, the way the live adapter computes it.

        Args:
            weight: Tensor of shape [outputs, inputs] or [experts, outputs, inputs], float32.
            x: Tensor of shape [inputs].

        Returns:
            Tensor of shape [outputs] or [experts, outputs].
        """
        a, b = self.a.to(weight.device), self.b.to(weight.device)
        y = weight @ x + self.scale * (b @ (a @ x)[..., None])[..., 0]
        if self.magnitude is not None:
            # ‖W + s B A‖² per row, without the merged matrix: ‖W‖² + 2 s W·(B A) + s² ‖B A‖².
            cross = ((weight @ a.T) * b).sum(dim=1)
            update = ((b @ (a @ a.T)) * b).sum(dim=1)
            norms = (weight.square().sum(dim=1) + 2 * self.scale * cross + self.scale**2 * update).sqrt()
            y = y * self.magnitude.to(weight.device) / norms
        return y


def read_adapter(
    adapter_dir: Path, targets: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, LoraFactors], dict[str, torch.Tensor]]:
    """Reads an adapter.

    Args:
        adapter_dir: Its folder.
        targets: Its list of targets.

    Returns:
        Updates by full name of the module or expert parameter, and whole tensors by full parameter name.

    Raises:
        ExportError: The adapter uses a variant of LoRA that cannot be merged here, or its tensors are not its targets'.
    """
    config = read_config(adapter_dir)
    unsupported = [name for name in ("alpha_pattern", "fan_in_fan_out", "lora_bias") if getattr(config, name)]
    if unsupported or config.bias != "none":
        raise ExportError(
            f"the adapter uses {(unsupported or ['bias'])[0]}, which merging does not know; export it as 'lora' instead"
        )
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(adapter_dir / WEIGHTS_FILE).items()}
    factors = {}
    for target in targets:
        key = key_of(target)
        if f"{key}.lora_A.weight" not in tensors:
            raise ExportError(f"the adapter lists {target['name']!r} but has no tensors for it; train again")
        a, b = tensors.pop(f"{key}.lora_A.weight").float(), tensors.pop(f"{key}.lora_B.weight").float()
        magnitude = tensors.pop(f"{key}.lora_magnitude_vector", None)
        num_experts = target.get("num_experts")
        if num_experts is not None:
            # peft stacks the experts' A matrices, but deals the columns of their B matrices out in turn.
            a = a.reshape(num_experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1).contiguous()
        rank = a.shape[-2]
        scale = config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)
        factors[str(target["name"])] = LoraFactors(a, b, scale, None if magnitude is None else magnitude.float())
    left = sorted(key for key in tensors if ".lora_" in key)
    if left:
        raise ExportError(
            f"the adapter has {left[0]!r} ({len(left)} such), which its list of targets lacks; train again"
        )
    return factors, tensors
