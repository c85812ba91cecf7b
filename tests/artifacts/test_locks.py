"""Leases, for stores that know no file locks."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

from artifacts import Store
from artifacts.locks import file_lock, remove_if_free

from .conftest import publish, stored


@pytest.fixture
def lease_store(s3: str, tmp_path: Path) -> Store:
    return Store.open(f"{s3}/{os.urandom(4).hex()}", cache_dir=tmp_path / "cache")


def lease(store: Store) -> dict[str, object]:
    (path,) = stored(store, "leases")
    return json.loads(store.backend.read(path))


def test_a_lease_is_renewed_while_it_is_held_and_removed_after(lease_store: Store):
    with lease_store.lock("train", "k", lease_seconds=0.8):
        first = lease(lease_store)
        time.sleep(1.5)
        later = lease(lease_store)
        assert later["owner"] == first["owner"]
        assert float(str(later["expires"])) > max(time.time(), float(str(first["expires"])))
    assert stored(lease_store, "leases") == []


def test_the_lease_of_a_dead_owner_is_taken_over_when_it_expires(lease_store: Store):
    expires = time.time() + 1
    lease_store.backend.write("leases/train-k.json", json.dumps({"owner": "dead", "expires": expires}).encode())
    waited: list[float] = []
    with lease_store.lock("train", "k", on_wait=waited.append):
        assert time.time() >= expires
        assert waited
        assert lease(lease_store)["owner"] != "dead"


def test_the_lease_of_a_dead_owner_whose_clock_was_ahead_is_taken_over_too(lease_store: Store):
    far_away = time.time() + 2 * 86400
    lease_store.backend.write("leases/train-k.json", json.dumps({"owner": "dead", "expires": far_away}).encode())
    start = time.monotonic()
    with lease_store.lock("train", "k", lease_seconds=0.5):
        assert 0.5 <= time.monotonic() - start < 30
        assert lease(lease_store)["owner"] != "dead"


def test_a_lease_that_is_not_one_is_taken_over(lease_store: Store):
    lease_store.backend.write("leases/train-k.json", b"{")
    with lease_store.lock("train", "k"):
        assert "owner" in lease(lease_store)


def test_a_lease_lost_to_another_owner_is_left_alone(lease_store: Store):
    other = json.dumps({"owner": "other", "expires": time.time() + 60}).encode()
    with lease_store.lock("train", "k", lease_seconds=0.4):
        lease_store.backend.write("leases/train-k.json", other)
        time.sleep(0.5)
    assert lease(lease_store)["owner"] == "other"


def test_only_one_of_many_gets_a_lease(lease_store: Store):
    inside, most, done = [0], [0], []

    def work() -> None:
        with lease_store.lock("train", "k"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1
            done.append(1)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most, len(done)) == ([1], 5)


def test_a_lock_file_that_is_held_is_not_removed(tmp_path: Path):
    path = tmp_path / "locks" / "x.lock"
    with file_lock(path, shared=True), file_lock(path, shared=True):
        assert not remove_if_free(path)
    assert remove_if_free(path, dry_run=True)
    assert path.exists()
    assert remove_if_free(path)
    assert not path.exists()
    assert not remove_if_free(path)


def test_a_lock_file_removed_between_open_and_lock_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.lock"
    from artifacts import locks

    flock, calls = locks._flock, []

    def remove_first(descriptor: int, mode: int) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()
        return flock(descriptor, mode)

    monkeypatch.setattr(locks, "_flock", remove_first)
    with file_lock(path):
        assert path.exists()
        assert len(calls) == 2


def test_a_file_system_without_locks_only_loses_the_saving(file_store: Store, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("artifacts.locks.fcntl.flock", refuse)
    with file_store.lock("train", "k"), file_store.lock("train", "k"):
        assert publish(file_store, {"a": b"a"}).num_files == 1
