"""What happens around the core call of a unit."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from artifacts import StoreWriteError
from tasks.session import Session, UnitResult
from tests.support.small_disk import small_disk
from vlm.config import RunConfig


def write_bytes(path: Path) -> None:
    path.write_bytes(bytes(4 << 20))


def write_tensors(path: Path) -> None:
    save_file({"weight": np.zeros(1 << 20, np.float32)}, path)  # its error is no OSError


@pytest.mark.parametrize("write", [write_bytes, write_tensors])
def test_a_disk_that_fills_up_while_a_unit_is_built_is_one_error(tmp_path: Path, write: Callable[[Path], None]) -> None:
    def build(stage: Path, folders: Mapping[str, Path]) -> dict[str, object]:
        write(stage / "checkpoint" / "weights")
        return {}

    with small_disk(tmp_path / "disk", megabytes=2) as disk:
        session = Session.open(RunConfig.model_validate({"runtime": {"store": str(disk / "store")}}))
        with pytest.raises(StoreWriteError, match=r"no space is left.*Free some space"):
            session.run("load_model", {}, build)
        assert session.store.verify().num_records == 0
        assert not [path for path in (disk / "store" / "tmp").rglob("*") if path.is_file()]


def test_other_errors_of_a_unit_stay_what_they_are(tmp_path: Path) -> None:
    def build(stage: Path, folders: Mapping[str, Path]) -> dict[str, object]:
        raise RuntimeError("something else")

    session = Session.open(RunConfig.model_validate({"runtime": {"store": str(tmp_path / "store")}}))
    with pytest.raises(RuntimeError, match="something else"):
        session.run("load_model", {}, build)


def test_what_a_run_left_that_was_killed_after_its_record_is_removed(tmp_path: Path) -> None:
    def build(stage: Path, folders: Mapping[str, Path]) -> dict[str, object]:
        (stage / "checkpoint" / "weights").write_bytes(b"weights")
        return {}

    def run() -> UnitResult:
        return Session.open(config).run("load_model", {}, build)

    config = RunConfig.model_validate({"runtime": {"store": str(tmp_path / "store")}})
    key, store = run().key, Session.open(config).store
    left = store.resumable(key) / "checkpoint-3"
    left.mkdir()
    with store.lock("load_model", key):  # another process runs it anew
        assert run().cached
        assert left.exists()
    assert run().cached
    assert not store.has_resumable(key)


def test_a_store_that_may_only_be_read_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(stage: Path, folders: Mapping[str, Path]) -> dict[str, object]:
        (stage / "checkpoint" / "weights").write_bytes(b"weights")
        return {}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with small_disk(tmp_path / "disk", megabytes=2) as disk:
        config = RunConfig.model_validate({"runtime": {"store": str(disk / "store")}})
        made = Session.open(config).run("load_model", {}, build).outputs["checkpoint"]
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        session = Session.open(config)
        found = session.run("load_model", {}, build)
        assert found.cached
        assert found.outputs == {"checkpoint": made}
        assert (session.local(made) / "weights").read_bytes() == b"weights"
        session.close()
        with pytest.raises(StoreWriteError, match=r"not permitted.*write permission"):
            Session.open(config, rerun_from="load_model").run("load_model", {}, build)
