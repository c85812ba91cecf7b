"""File systems that are neither local nor object stores: every write by temporary file and move."""

from __future__ import annotations

from pathlib import Path

import pytest

from artifacts import Store, StoreWriteError
from artifacts.gc import collect
from artifacts.remote import RemoteBackend

from .conftest import flip_byte, publish, read_tree, stored


@pytest.fixture
def generic(tmp_path: Path) -> Store:
    """A store through fsspec's own local file system, which stands for sftp, smb or hdfs."""
    backend = RemoteBackend((tmp_path / "remote").as_uri())
    return Store(backend, work_dir=tmp_path / "cache", stamps_dir=tmp_path / "cache" / "stamps")


def test_a_round_trip(generic: Store):
    ref = publish(generic, {"a/b": b"content", "c": b""})
    generic.record("train", "k", {}, {"out": ref})
    assert generic.lookup("train", "k", full=True) is not None
    assert read_tree(generic.materialize(ref)) == {"a/b": b"content", "c": b""}
    assert stored(generic, "tmp") == []
    with generic.lock("train", "k"):
        assert stored(generic, "leases") == ["leases/train-k.json"]
    assert generic.verify().problems == ()
    flip_byte(generic, f"objects/{(digest := generic.manifest(ref).file('a/b').sha256)[:2]}/{digest}")
    assert generic.lookup("train", "k") is None
    report = collect(generic, dry_run=False, keep_last=0, grace_seconds=0)
    assert (len(report.records), len(report.manifests), len(report.objects)) == (1, 1, 1)


def test_a_failed_write_leaves_no_temporary_file(generic: Store, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(generic.backend._fs), "mv", refuse)  # type: ignore[attr-defined]
    with pytest.raises(StoreWriteError, match="not permitted"):
        publish(generic, {"a": b"a"})
    assert stored(generic, "tmp") == stored(generic, "objects") == []
