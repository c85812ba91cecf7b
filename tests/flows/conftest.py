"""A run small enough for a test: few rows, few steps, the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def small_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run that takes seconds, on a store of its own."""
    return settings_on(tmp_path_factory.mktemp("runs") / "store")


def settings_on(store: Path) -> dict[str, Any]:
    return {
        "data": {"sources": [{"path": "builtin", "max_rows": 48}]},
        "lora": {"rank": 4},
        "training": {"max_steps": 3, "gradient_accumulation": 1, "log_every_steps": 1},
        "generation": {"max_new_tokens": 12, "max_rows": 4},
        "export": {"verify": False},  # a process that loads torch anew, for every export: one test does it
        "runtime": {"store": str(store)},
    }
