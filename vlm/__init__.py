"""The core: configuration, data, models, training, evaluation and export, usable without Prefect.

The names below are for notebooks. They are looked up when first used, so that ``import vlm`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.facade.collator import VisionDataCollator
    from vlm.facade.dataset import to_dataset
    from vlm.facade.model import FastVisionModel
    from vlm.facade.precision import is_bf16_supported
    from vlm.facade.vision_info import process_vision_info

_FACADE = {
    "FastVisionModel": "vlm.facade.model",
    "VisionDataCollator": "vlm.facade.collator",
    "is_bf16_supported": "vlm.facade.precision",
    "process_vision_info": "vlm.facade.vision_info",
    "to_dataset": "vlm.facade.dataset",
}

__all__ = ["FastVisionModel", "VisionDataCollator", "is_bf16_supported", "process_vision_info", "to_dataset"]


def __getattr__(name: str) -> Any:
    """Imports a notebook name's module at first use (PEP 562)."""
    if name not in _FACADE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FACADE[name]), name)


def __dir__() -> list[str]:
    """Shows the notebook names to completion."""
    return sorted({*globals(), *__all__})
