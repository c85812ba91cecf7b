from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.config.pretrain import PretrainConfig

# Of the extra `pretrain`, which `test` includes; whoever installs less skips what draws.
PACKAGES = ("babel", "spellchecker", "font_roboto", "fontpkg_inter", "pymupdf_fonts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    for item in items:
        if missing and "tests/vlm/pretrain/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=f"the extra 'pretrain' is not installed: no {missing[0]}"))


SMALLEST = {
    "vision_layers": 2,
    "vision_width": 64,
    "vision_mlp_width": 64,
    "language_layers": 1,
    "language_width": 128,
    "language_mlp_width": 64,
}


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Makes settings of a training of seconds, with some of them changed."""

    def make(**changes: Any) -> PretrainConfig:
        settings: dict[str, Any] = {
            "architecture": SMALLEST,
            "num_steps": 8,
            "positions_per_step": 1500,
            "warmup_steps": 2,
            "learning_rate": 3e-3,
            "log_every_steps": 1,
            "num_workers": 0,
            "device": "cpu",
            "rows_per_kind": 1,
            "work_dir": str(tmp_path / "work"),
            "output_dir": str(tmp_path / "model"),
        }
        return PretrainConfig.model_validate({**settings, **changes})

    return make
