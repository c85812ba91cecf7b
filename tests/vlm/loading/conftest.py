"""Checkpoints of every family in every quantisation, built once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.tiny_models import TINY_FAMILIES, is_available, make_tiny_checkpoint
from vlm.config.model import ModelConfig, Quantization
from vlm.loading.build import build_checkpoint

Checkpoint = Callable[[str, Quantization], Path]


@pytest.fixture(scope="session", params=TINY_FAMILIES)
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {
        model_type: make_tiny_checkpoint(model_type, root / model_type)
        for model_type in TINY_FAMILIES
        if is_available(model_type)
    }


@pytest.fixture(scope="session")
def checkpoint(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Gives the folder of a family and quantisation; tests only read it."""
    root = tmp_path_factory.mktemp("checkpoints")

    def build(model_type: str, quantization: Quantization) -> Path:
        folder = root / f"{model_type}-{quantization}"
        if not folder.exists():
            settings = ModelConfig(name=str(sources[model_type]), quantization=quantization)
            build_checkpoint(settings, folder, device="cpu", dtype="float32")
        return folder

    return build
