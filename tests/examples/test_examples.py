"""The examples run as they stand, only shorter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(path.name for path in (PROJECT / "examples").glob("*.py")))
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"NUM_STEPS": "12", "OUTPUT": str(tmp_path / "out"), "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, str(PROJECT / "examples" / name)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = re.search(r"loss (\S+) -> (\S+) in", done.stdout)
    assert losses is not None
    assert float(losses[2]) < float(losses[1]) - 0.3
    answers = re.search(r"written on the image: .*\n(.*)\nreloaded: (.*)\n", done.stdout)
    assert answers is not None
    assert answers[1].replace("<|im_end|>", "").strip() == answers[2].strip()
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"lora", "merged"}
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]
