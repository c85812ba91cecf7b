"""Reads a checkpoint's weights one at a time, dequantised, under the names of the live model's parameters.

transformers stores many models under older names than their modules have (``visual.`` for ``model.visual.``); the
mapping comes from transformers itself. Loads torch, transformers and, for quantised weights, bitsandbytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from vlm.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What bitsandbytes stores beside a quantised weight.
_NF4_MARK = ".quant_state.bitsandbytes__"
_NF4_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_INT8_PARTS = (".SCB", ".weight_format")


def stored_names(model: PreTrainedModel) -> dict[str, str]:
    """Under which key each tensor of a model is stored in a checkpoint of ours.

    Args:
        model: May be without storage (on the meta device).

    Returns:
        Keys in a checkpoint by full name in the model, tied weights included.
    """
    from vlm.loading.stored_names import older_names

    names = list(model.state_dict())
    return dict(zip(names, older_names(model, names), strict=True))


def stored_scales(model: PreTrainedModel) -> dict[str, str]:
    """Under which key the scales of each weight are stored where that is quantised to 8 bits.

    transformers renames some weights by their whole name, which does not take their scales along.

    Args:
        model: May be without storage (on the meta device).

    Returns:
        Keys in a checkpoint by the keys of the weights.
    """
    from vlm.loading.stored_names import older_names

    weights = [name for name in model.state_dict() if name.endswith(".weight")]
    scales = [name.removesuffix("weight") + "SCB" for name in weights]
    return dict(zip(older_names(model, weights), older_names(model, scales), strict=True))


class StoredWeights:
    """The weights of a checkpoint folder.

    A file is mapped anew for each weight: the pages that were read count as the process's memory for as long as the
    mapping stays, and with one mapping for all weights that would be the whole checkpoint at the end.

    Args:
        model_dir: Folder with safetensors files.
        device: ``cpu`` or ``cuda``, where weights are dequantised.
        scale_keys: Where `stored_scales` finds 8-bit weights' scales.

    Raises:
        ExportError: The folder has no weights.
    """

    def __init__(self, model_dir: Path, device: str, scale_keys: Mapping[str, str]) -> None:
        self._model_dir = model_dir
        self._device = device
        self._scale_keys = scale_keys
        self._files: dict[str, Path] = {}
        for path in sorted(model_dir.glob("*.safetensors")):
            with safe_open(path, framework="pt", device="cpu") as file:
                self._files.update(dict.fromkeys(file.keys(), path))
        if not self._files:
            raise ExportError(f"{model_dir} has no safetensors files; load the model again")

    def keys(self) -> Iterator[str]:
        """Keys of the weights themselves, sorted, without what belongs to their quantisation."""
        for key in sorted(self._files):
            if _NF4_MARK in key or key.endswith(_INT8_PARTS):
                continue
            base = next((key.removesuffix(part) for part in _NF4_PARTS if key.endswith(part)), None)
            if base is None or base not in self._files:
                yield key

    def read(self, key: str) -> torch.Tensor:
        """Reads one weight, dequantised to float32 where it was quantised.

        Args:
            key: One of ``keys()``.

        Returns:
            A tensor on the device, in its logical shape.
        """
        tensor = self._stored(key).to(self._device)
        mark = (
            next((other for other in self._files if other.startswith(key + _NF4_MARK)), None)
            if tensor.dtype == torch.uint8
            else None
        )
        if mark is not None:
            return self._dequantize_nf4(key, mark, tensor)
        if tensor.dtype == torch.int8:
            scale_key = self._scale_keys.get(key)
            if scale_key not in self._files:
                raise ExportError(
                    f"{self._model_dir} stores {key!r} in 8 bits without its scales; load the model again"
                )
            row_maximum = self._stored(scale_key).to(self._device, torch.float32)
            # LLM.int8() stores each row as 127 · weight / (the row's largest absolute value).
            return tensor.to(torch.float32) * (row_maximum / 127)[:, None]
        return tensor

    def _stored(self, key: str) -> torch.Tensor:
        with safe_open(self._files[key], framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor

    def _dequantize_nf4(self, key: str, mark: str, packed: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {
            other.removeprefix(f"{key}."): self._stored(other)
            for other in (mark, *(key + part for part in _NF4_PARTS))
            if other in self._files
        }
        state = QuantState.from_dict(parts, device=torch.device(self._device))
        state.dtype = torch.float32
        return dequantize_4bit(packed, quant_state=state)


def stored_config(model_dir: Path) -> dict[str, Any]:
    """The checkpoint's ``config.json`` without its quantisation.

    Args:
        model_dir: Folder of the checkpoint's model.
    """
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    return config
