"""A run small enough for a test: few rows, few steps, the built-in model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """Prefect's own server for tests; a flow run here talks to it."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def first_run(small_settings: dict[str, Any], prefect_server: None) -> dict[str, Any]:
    """The summary of a run of the whole pipeline."""
    from flows.vision_finetune import vision_finetune
    from vlm.config import RunConfig

    return vision_finetune(RunConfig.model_validate(small_settings))


@pytest.fixture(scope="session")
def small_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run that takes seconds, on a store of its own."""
    return settings_on(tmp_path_factory.mktemp("runs") / "store")


def settings_on(store: Path) -> dict[str, Any]:
    return {
        "model": {"name": "builtin-random"},
        "data": {"sources": [{"path": "builtin", "max_rows": 48}]},
        "lora": {"rank": 4},
        "training": {"max_steps": 3, "gradient_accumulation": 1, "log_every_steps": 1},
        "generation": {"max_new_tokens": 12, "max_rows": 4},
        "export": {"verify": False},  # a process that loads torch anew, for every export: one test does it
        "runtime": {"store": str(store)},
    }
