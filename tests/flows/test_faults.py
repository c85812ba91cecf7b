"""What a run leaves when it is killed, shares its store, or finds it damaged: whole runs, many times over.

One process does it all, see `tests/support/fault_suite.py`, because each would have to import torch for itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.artifacts.conftest import s3_address  # noqa: F401  (a fixture)

PROJECT = Path(__file__).resolve().parents[2]
NUM_KILLS = 20


@pytest.fixture(scope="module")
def found(s3_address: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:  # noqa: F811
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "tests.support.fault_suite", str(folder), "20261125", str(NUM_KILLS)]
    one_thread = {"OMP_NUM_THREADS": "1"}  # more would not survive a fork
    done = subprocess.run(
        [*command, s3_address],
        cwd=PROJECT,
        env=os.environ | one_thread,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_killed_runs_go_on_to_the_same_artifacts(found: dict[str, Any]) -> None:
    series = found["kills"]
    assert len(series["kills"]) == NUM_KILLS
    assert series["faults"] == []
    assert series["num_runs"] >= 1
    # The seed is such that the kills are worth something: several steps, a training among them, and things half-written.
    assert len({kill["unit"] for kill in series["kills"]}) >= 5
    assert series["num_resumed"] >= 1
    assert any(kill["num_half_written"] for kill in series["kills"])


def test_killed_runs_leave_a_sound_log(found: dict[str, Any]) -> None:
    series = found["tracked"]["kills"]
    assert series["faults"] == []
    units = [kill["unit"] for kill in series["kills"]]
    # In a training that goes on, after it, and while the end is logged.
    assert units.count("train") >= 2
    assert series["num_resumed"] == 1
    assert units.count("after the last step") >= 2
    assert series["num_ended"] >= 4


def test_a_database_is_made_by_many_at_once_after_others_were_killed_at_it(found: dict[str, Any]) -> None:
    assert found["tracked"]["created"] == []


def test_an_interrupted_run_is_marked_as_killed_and_goes_on(found: dict[str, Any]) -> None:
    assert found["tracked"]["interrupted"] == []


@pytest.mark.parametrize("where", ["file", "s3"])
def test_four_processes_on_one_store_share_the_work_of_a_fifth_that_is_killed(
    found: dict[str, Any], where: str
) -> None:
    result = found[where]
    assert result["faults"] == []
    # The fifth takes the count of what it finished along; it was killed in the training.
    assert result["ran"]["train"] == 1
    assert set(result["ran"].values()) == {1}


def test_a_collection_leaves_what_running_flows_hold(found: dict[str, Any]) -> None:
    result = found["collected"]
    assert result["faults"] == []
    assert result["collector"]["rounds"] > 2
    assert result["collector"]["dropped"] > 0
    assert set(result["ran"].values()) <= {1}


@pytest.mark.parametrize("how", ["open", "silent"])
def test_a_store_with_every_file_damaged_is_mended(found: dict[str, Any], how: str) -> None:
    assert found[f"damage_{how}"]["faults"] == []
