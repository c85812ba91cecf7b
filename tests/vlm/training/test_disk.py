import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.tiny_training import RESUMED, Training
from vlm.config import LoraConfig
from vlm.errors import ResourceError
from vlm.training.disk import check_disk

# Bytes of a trained weight in a result, and in a checkpoint with AdamW's two sums.
RESULT, CHECKPOINT = 4, 12


@pytest.fixture
def check(tiny_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Checks a training of four steps with so many bytes free for each trained weight."""

    def on_disk(free: int, *, there: int = 0, **settings: Any) -> None:
        training = Training(tiny_run("qwen2_5_vl"), tmp_path / "run", LoraConfig(rank=2), **(RESUMED | settings))
        num_trained = json.loads((training.root / "initial" / "targets.json").read_text())["num_trainable_parameters"]
        for name in ("work", "out"):
            (training.root / name).mkdir(exist_ok=True)
        (training.root / "work" / "old").write_bytes(bytes(there * num_trained))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free * num_trained))
        root = training.root
        check_disk(root / "initial", root / "plan", training.training, root / "work", root / "out")

    return on_disk


@pytest.mark.parametrize(
    ("needed", "settings"),
    [
        # A checkpoint while the one before is there.
        (2 * CHECKPOINT, {}),
        # One, at the end, beside the result.
        (CHECKPOINT + RESULT, {"checkpoint_every_steps": 4}),
        (RESULT, {"checkpoint_every_steps": None}),
        (2 * CHECKPOINT + 2 * RESULT, {"keep_best": "loss", "evaluate_every_steps": 1}),
    ],
)
def test_a_disk_that_is_too_small_is_found_before_the_training(
    check: Callable[..., None], needed: int, settings: dict[str, Any]
) -> None:
    check(needed, **settings)
    with pytest.raises(ResourceError, match=r"GB free but this training will hold up to.*checkpoint_every_steps"):
        check(needed - 1, **settings)


def test_what_an_interrupted_run_has_left_makes_room(check: Callable[..., None]) -> None:
    check(CHECKPOINT, there=CHECKPOINT)
