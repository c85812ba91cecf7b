"""Keeps the last loaded model of this process, so that steps in a row do not load it again."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm.loading.checkpoint import LoadedModel

_lock = threading.RLock()
_held: tuple[str, LoadedModel] | None = None


def hold(key: str, build: Callable[[], LoadedModel]) -> LoadedModel:
    """The model held under a key, built if another one or none is held.

    The previous model is freed before the next one is built, since both may not fit. A caller that keeps a reference to
    it keeps its memory as well.

    Args:
        key: Names the model and its device, such as an artifact's digest and the device.
        build: Loads the model.
    """
    global _held
    with _lock:
        if _held is not None and _held[0] == key:
            return _held[1]
        release()
        model = build()
        _held = (key, model)
        return model


def release() -> None:
    """Frees the held model and gives unused GPU memory back."""
    global _held
    with _lock:
        _held = None
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
