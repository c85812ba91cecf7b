"""Where on this machine is kept what can always be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The folder for what can always be made again: file digests, downloads of remote artifacts, quantised checkpoints.

    ``VISION_FINETUNE_CACHE`` moves it; otherwise it lies in the user's cache folder.
    """
    if chosen := os.environ.get("VISION_FINETUNE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vision-finetune"
