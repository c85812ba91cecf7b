"""Tiny loaded models and their datasets, made once for all tests of the core that need one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

if TYPE_CHECKING:
    from vlm.loading.checkpoint import LoadedModel


@dataclass(frozen=True)
class TinyRun:
    """A base model, live and on disk, with a prepared dataset."""

    loaded: LoadedModel
    dataset_dir: Path

    @property
    def checkpoint_dir(self) -> Path:
        return self.loaded.checkpoint_dir


@pytest.fixture(scope="session", autouse=True)
def several_packs() -> Iterator[None]:
    """All tiny rows of a step would fit into one pack of the size that a CPU takes at least."""
    with mock.patch("vlm.training.plan.CPU_PACK_TOKENS", 1):
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyRun]:
    """Gives the run of a family and quantisation. Tests must leave its model as they found it."""
    import torch

    from tests.support.tiny_runs import load, make_checkpoint, mixed_rows, write_dataset

    # On matrices this small, a second thread only waits for the first.
    torch.set_num_threads(1)
    made: dict[tuple[str, str], TinyRun] = {}

    def get(model_type: str, quantization: str = "none") -> TinyRun:
        key = (model_type, quantization)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{model_type}-{quantization}")
            loaded = load(make_checkpoint(model_type, folder, quantization))
            rows = {"train": mixed_rows(8), "validation": mixed_rows(3), "test": mixed_rows(5)}
            made[key] = TinyRun(loaded, write_dataset(folder / "dataset", loaded.processing, rows))
        return made[key]

    return get
