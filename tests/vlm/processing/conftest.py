"""A processor of each family, and the Hugging Face processor built from the same files as the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_family import TinyFamily
from tests.support.tiny_models import TINY, TINY_FAMILIES, make_tiny_checkpoint
from vlm.processing import Processing


@dataclass(frozen=True)
class Pair:
    folder: Path
    ours: Processing
    oracle: Any
    facts: TinyFamily


@pytest.fixture(scope="session", params=TINY_FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return _pair(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The built-in model's family, for what does not depend on the family or is that family's own."""
    return _pair("qwen2_5_vl", tmp_path_factory)


def _pair(model_type: str, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = make_tiny_checkpoint(model_type, tmp_path_factory.mktemp(model_type))
    return Pair(folder, Processing.from_dir(folder), TINY[model_type].stock_processor(folder), TINY[model_type])
