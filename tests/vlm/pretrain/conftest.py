from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_pretraining import smallest_settings
from vlm.config.pretrain import PretrainConfig

# Of the extra `pretrain`, which `test` includes; whoever installs less skips what draws.
PACKAGES = ("babel", "spellchecker", "font_roboto", "fontpkg_inter", "pymupdf_fonts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    for item in items:
        if missing and "tests/vlm/pretrain/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=f"the extra 'pretrain' is not installed: no {missing[0]}"))


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Makes settings of a training of seconds, with some of them changed."""

    def make(**changes: Any) -> PretrainConfig:
        return PretrainConfig.model_validate(smallest_settings(tmp_path) | changes)

    return make
