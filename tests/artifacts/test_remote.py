"""File systems that are neither local nor object stores: every write by temporary file and move."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from artifacts import Store, StoreUnavailableError, StoreWriteError, patience
from artifacts.gc import collect
from artifacts.remote import RemoteBackend

from .conftest import flip_byte, publish, read_tree, stored


@pytest.fixture
def generic(tmp_path: Path) -> Store:
    """A store through fsspec's own local file system, which stands for sftp, smb or hdfs."""
    backend = RemoteBackend((tmp_path / "remote").as_uri())
    return Store(backend, work_dir=tmp_path / "cache", stamps_dir=tmp_path / "cache" / "stamps")


def test_a_store_that_is_away_for_a_while_is_waited_for(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from moto.server import ThreadedMotoServer

    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.1)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # Without the driver's own repetitions, which hide a short absence.
    options = {"endpoint_url": f"http://{host}:{port}", "config_kwargs": {"retries": {"max_attempts": 0}}}
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    store = Store.open(f"{s3}/away", cache_dir=tmp_path / "cache", **options)
    ref = publish(store, {"a": b"a" * 100_000})
    server.stop()

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    back = threading.Timer(1.0, server.start)
    back.start()
    try:
        assert read_tree(store.materialize(ref)) == {"a": b"a" * 100_000}
        assert "cannot be read" in caplog.text
        assert "Trying again" in caplog.text
    finally:
        back.join()
        server.stop()

    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.5)
    with pytest.raises(StoreUnavailableError, match="connection"):
        store.lookup("train", "k")


def test_a_read_that_fails_half_way_goes_on_where_it_was(generic: Store, monkeypatch: pytest.MonkeyPatch):
    content = bytes(range(256)) * 40_000
    ref = publish(generic, {"a": content})
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.01)
    open_stored, failed = generic.backend._fs.open, []  # type: ignore[attr-defined]

    def open_failing(path: str, *arguments: Any, **options: Any) -> Any:
        stream = open_stored(path, *arguments, **options)
        readinto = getattr(stream, "readinto", None)

        def fail_first(buffer: bytearray) -> int:
            if len(failed) < 3:
                failed.append(stream.read(1000))  # lost
                raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
            return int(readinto(buffer))  # type: ignore[misc]

        if "/objects/" in path:
            monkeypatch.setattr(stream, "readinto", fail_first, raising=False)
        return stream

    monkeypatch.setattr(generic.backend._fs, "open", open_failing)  # type: ignore[attr-defined]
    assert read_tree(generic.materialize(ref)) == {"a": content}
    assert len(failed) == 3


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
