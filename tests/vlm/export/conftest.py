"""Models that can become GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.vlm.conftest import TinyRun

# Images that several attention windows of 112 pixels cover, cut off at the edges.
WINDOWS = (("Total 12.50", ((168, 252),)), ("Milk 2 x 1.19", ((224, 140), (56, 84))))


@pytest.fixture(scope="session")
def gguf_run(tiny_run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Runs of tiny models; the tiny Qwen2.5-VL has windows that llama.cpp lacks, so the built-in model stands for it."""
    made: dict[str, TinyRun] = {}

    def get(name: str) -> Any:
        if name != "builtin":
            return tiny_run(name)
        if not made:
            from tests.support.tiny_runs import load, mixed_rows, write_dataset
            from vlm.config import ModelConfig
            from vlm.loading.build import build_checkpoint

            folder = tmp_path_factory.mktemp("builtin")
            config = ModelConfig(quantization="none", precision="float32")
            build_checkpoint(config, folder / "checkpoint", device="cpu", dtype="float32")
            loaded = load(folder / "checkpoint")
            rows = {"train": mixed_rows(2), "test": WINDOWS}
            made[name] = TinyRun(loaded, write_dataset(folder / "dataset", loaded.processing, rows))
        return made[name]

    return get
