"""Garbage collection, on every kind of address."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts import ArtifactRef, Store, gc, pins
from artifacts.gc import collect

from .conftest import flip_byte, publish, read_tree, stored


def keep(store: Store, unit: str, number: int, monkeypatch: pytest.MonkeyPatch, *, days_ago: float = 0) -> ArtifactRef:
    """Publishes and records an artifact of its own, plus one file that all share."""
    ref = publish(store, {"own": f"{unit} {number}", "shared": b"shared"})
    created = time.time() - days_ago * 86400
    from datetime import UTC, datetime

    monkeypatch.setattr(
        "artifacts.store.now", lambda: datetime.fromtimestamp(created, UTC).isoformat(timespec="microseconds")
    )
    store.record(unit, f"{number:064x}", {"n": number}, {"out": ref})
    monkeypatch.undo()
    return ref


def contents(store: Store) -> list[str]:
    return [path for folder in ("index", "manifests", "objects", "pins", "tmp") for path in stored(store, folder)]


def test_nothing_recorded_young_or_pinned_is_removed(store: Store, monkeypatch: pytest.MonkeyPatch):
    keep(store, "train", 1, monkeypatch)
    publish(store, {"loose": b"young"})
    before = contents(store)
    assert collect(store, dry_run=False).freed_bytes == 0
    assert contents(store) == before
    report = collect(store, dry_run=False, grace_seconds=0)
    assert (len(report.manifests), len(report.objects), report.kept_records) == (1, 1, 1)
    assert report.freed_bytes == len(b"young")
    assert store.lookup("train", f"{1:064x}", full=True) is not None


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"keep_last": 2}, [2, 3]),
        ({"keep_last": 0}, []),
        ({"older_than_days": 15}, [2, 3]),
        ({"older_than_days": 25, "keep_last": 1}, [1, 2, 3]),
        ({"older_than_days": 0, "keep_last": 1}, [3]),
        ({"older_than_days": 100}, [0, 1, 2, 3]),
    ],
)
def test_the_policy_for_records_and_the_dry_run(
    store: Store, monkeypatch: pytest.MonkeyPatch, policy: dict[str, int], kept: list[int]
):
    refs = {number: keep(store, "train", number, monkeypatch, days_ago=30.5 - 10 * number) for number in range(4)}
    before = contents(store)
    dry = collect(store, dry_run=True, grace_seconds=0, **policy)
    assert contents(store) == before, "a dry run removes nothing"
    real = collect(store, dry_run=False, grace_seconds=0, **policy)
    assert dataclasses.replace(dry, dry_run=False) == real
    assert len(real.records) == 4 - len(kept)
    for number, ref in refs.items():
        assert (store.lookup("train", f"{number:064x}") is not None) == (number in kept)
        assert (ref.digest in set(store.digests())) == (number in kept)
    assert store.verify().problems == ()
    again = collect(store, dry_run=False, grace_seconds=0, **policy)
    assert (again.records, again.manifests, again.objects, again.freed_bytes) == ([], [], [], 0)


def test_units_are_counted_apart(store: Store, monkeypatch: pytest.MonkeyPatch):
    for unit in ("train", "export"):
        for number in range(2):
            keep(store, unit, number, monkeypatch)
    assert collect(store, dry_run=False, keep_last=1, grace_seconds=0).kept_records == 2
    assert len(store.records("train")) == len(store.records("export")) == 1


def test_a_dropped_record_leaves_young_artifacts(store: Store, monkeypatch: pytest.MonkeyPatch):
    ref = keep(store, "train", 1, monkeypatch)
    report = collect(store, dry_run=False, keep_last=0)
    assert (len(report.records), report.manifests, report.objects) == (1, [], [])
    assert read_tree(store.materialize(ref))["shared"] == b"shared"


def test_pins_protect_until_they_end_or_expire(store: Store, monkeypatch: pytest.MonkeyPatch):
    recorded = keep(store, "train", 1, monkeypatch)
    loose = publish(store, {"loose": b"loose"})
    with store.pin([recorded]) as pin:
        pin.add(loose.digest)
        report = collect(store, dry_run=False, keep_last=0, grace_seconds=0)
        assert (report.records, report.manifests, report.objects) == ([], [], [])
        assert read_tree(store.materialize(loose)) == {"loose": b"loose"}
    assert stored(store, "pins") == []

    owner = subprocess.Popen(["true"])  # and died long ago
    owner.wait()
    pin = pins.Pin(store.backend, seconds=-1)
    with monkeypatch.context() as patch:
        patch.setattr(pins, "os", types.SimpleNamespace(getpid=lambda: owner.pid))
        pin.add(loose)
    report = collect(store, dry_run=False, keep_last=0, grace_seconds=0)
    assert (len(report.manifests), report.leftovers) == (2, [pin._path])
    assert contents(store) == []


def test_a_pin_is_renewed_while_it_is_held(store: Store):
    ref = publish(store, {"a": b"a"})
    with store.pin([ref], seconds=0.6):
        time.sleep(1.2)
        assert pins.read_pins(store.backend)[0] == {ref.digest}
    with pytest.raises(ValueError, match="digest"), store.pin(["nonsense"]):
        pass
    assert stored(store, "pins") == []


def test_the_pin_of_a_living_owner_survives_a_clock_that_jumps(store: Store, monkeypatch: pytest.MonkeyPatch):
    ref = keep(store, "train", 1, monkeypatch)
    clock = time.time
    with store.pin([ref]), monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: clock() + 7 * 86400)  # the machine has slept
        report = collect(store, dry_run=False, keep_last=0)
        assert (report.records, report.manifests, report.objects, report.leftovers) == ([], [], [], [])
    assert store.lookup("train", f"{1:064x}", full=True) is not None


def test_a_record_that_is_found_and_then_pinned_is_whole_or_known_to_be_gone(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    first, second = (keep(store, unit, 1, monkeypatch) for unit in ("train", "export"))
    key = f"{1:064x}"
    found = store.lookup("train", key)
    assert found is not None
    assert store.lookup("export", key) is not None
    drop = gc._Collection._collect_records

    def pin_meanwhile(self: gc._Collection, *arguments: object) -> set[str]:
        pin.add(second)
        assert store.is_recorded("export", key)
        live = drop(self, *arguments)  # type: ignore[arg-type]
        pin.add(first)
        assert not store.is_recorded("train", key), "whoever pins now sees that it came too late"
        return live

    with store.pin() as pin, monkeypatch.context() as patch:
        patch.setattr(gc._Collection, "_collect_records", pin_meanwhile)
        collect(store, dry_run=False, keep_last=0, grace_seconds=0)
        assert read_tree(store.materialize(second))["own"] == b"export 1"


def test_work_and_folders_that_vanish_meanwhile_do_not_end_a_collection(file_store: Store):
    stop = threading.Event()

    def come_and_go(key: str) -> None:
        while not stop.is_set():
            with file_store.staging() as folder:
                (folder / "part").write_bytes(b"x")
                work = file_store.resumable(key)
                (work / "checkpoint-1").mkdir(exist_ok=True)
                (work / "checkpoint-1" / "weights").write_bytes(b"weights")
            shutil.rmtree(work, ignore_errors=True)

    threads = [threading.Thread(target=come_and_go, args=(letter * 64,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    try:
        for _ in range(150):
            assert collect(file_store, dry_run=True, grace_seconds=0).abandoned == []
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_interrupted_work_stays_for_a_week(store: Store):
    fresh, forgotten = store.resumable("a" * 64), store.resumable("b" * 64)
    for folder in (fresh, forgotten):
        (folder / "checkpoint-10").mkdir()
        (folder / "checkpoint-10" / "weights").write_bytes(b"weights")
    eight_days_ago = time.time() - 8 * 86400
    for path in (forgotten / "checkpoint-10" / "weights", forgotten / "checkpoint-10", forgotten, fresh):
        os.utime(path, (eight_days_ago, eight_days_ago))
    assert collect(store, dry_run=True).abandoned == [forgotten.name]
    assert forgotten.exists()
    assert collect(store, dry_run=False, grace_seconds=0).abandoned == [forgotten.name]
    assert fresh.exists()
    assert not forgotten.exists()


def test_folders_of_removed_artifacts_go_and_others_stay(store: Store, monkeypatch: pytest.MonkeyPatch):
    kept, dropped = keep(store, "train", 1, monkeypatch), publish(store, {"loose": b"loose"})
    folders = [store.materialize(ref) for ref in (kept, dropped)]
    assert collect(store, dry_run=False).materialized == []
    report = collect(store, dry_run=False, grace_seconds=0)
    assert report.materialized == [dropped.digest]
    assert [folder.exists() for folder in folders] == [True, False]
    assert len(report.cached) == (0 if store.backend.is_local else 1)
    assert read_tree(store.materialize(kept))["shared"] == b"shared"


def test_corrupt_manifests_and_records_are_collected(store: Store, monkeypatch: pytest.MonkeyPatch):
    keep(store, "train", 1, monkeypatch)
    for folder in ("manifests", "index"):
        flip_byte(store, stored(store, folder)[0], 30)
    report = collect(store, dry_run=False, grace_seconds=0)
    assert (len(report.records), len(report.manifests), len(report.objects)) == (1, 1, 2)
    assert contents(store) == []


def test_a_negative_limit_is_refused(store: Store):
    for policy in ({"keep_last": -1}, {"older_than_days": -1}, {"grace_seconds": -1}):
        with pytest.raises(ValueError, match="must be 0 or more"):
            collect(store, dry_run=True, **policy)


def test_verify_reports_and_removes_every_kind_of_damage(
    store: Store, monkeypatch: pytest.MonkeyPatch, reopen: Callable[[], Store]
):
    for number in range(4):
        keep(store, "train", number, monkeypatch)
    counts: list[int] = []
    report = store.verify(on_bytes=counts.append)
    assert (report.num_records, report.num_manifests, report.num_objects, report.problems) == (4, 4, 5, ())
    assert sum(counts) == report.size_bytes > 0

    objects = [store.manifest(record.outputs["out"]).file("own").sha256 for record in store.records("train")]
    flip_byte(store, f"objects/{objects[0][:2]}/{objects[0]}", 2, keep_time=True)
    store.backend.remove(f"objects/{objects[1][:2]}/{objects[1]}")
    flip_byte(store, stored(store, "index")[0], 50)
    manifest = next(
        path for path in stored(store, "manifests") if store.records("train")[2].outputs["out"].digest in path
    )
    flip_byte(store, manifest, 50)
    found = sorted((problem.part, problem.what.split(" (")[0]) for problem in store.verify().problems)
    assert [part for part, _ in found] == ["manifest", "manifest", "object", "record"]
    assert len(stored(store, "index")) == 4
    assert store.verify(remove=True).removed
    assert len(stored(store, "index")) == len(stored(store, "manifests")) == len(stored(store, "objects")) == 3
    assert {problem.what.rpartition(" is ")[2] for problem in store.verify().problems} == {"missing"}
    assert store.lookup("train", f"{3:064x}") is None


def test_publishing_and_collecting_exclude_each_other_in_a_local_store(
    file_store: Store, make_tree: Callable[..., Path]
):
    publish(file_store, {"a": b"old"})
    folder = make_tree({"a": b"old", "b": b"new"})

    class WaitedError(Exception):
        pass

    def collect_meanwhile(_: int) -> None:
        from artifacts.locks import file_lock

        def give_up(seconds: float) -> None:
            raise WaitedError

        lock = file_store.backend.root / "locks" / "gc.lock"  # type: ignore[attr-defined]
        with pytest.raises(WaitedError), file_lock(lock, on_wait=give_up):
            pass

    ref = file_store.publish(folder, kind="dataset", consume=True, on_bytes=collect_meanwhile)
    collect(file_store, dry_run=False)
    assert len(read_tree(file_store.materialize(ref))) == 2


def test_an_old_object_that_is_published_again_counts_as_young(file_store: Store):
    import os

    ref = publish(file_store, {"a": b"old"})
    for folder in ("objects", "manifests"):
        for path in stored(file_store, folder):
            os.utime(file_store.backend.root / path, (1, 1))  # type: ignore[attr-defined]
    assert publish(file_store, {"a": b"old"}) == ref
    assert collect(file_store, dry_run=True).objects == []


def test_what_a_remote_collection_removed_meanwhile_is_uploaded_again(
    tmp_path: Path, make_tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    store = Store.open(f"memory://{tmp_path.name}-gc", cache_dir=tmp_path / "cache")
    publish(store, {"a": b"old"})
    write = Store._write_manifest

    def collect_just_before(self: Store, manifest: object) -> None:
        assert len(collect(store, dry_run=False, grace_seconds=0).objects) == 1
        write(self, manifest)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "_write_manifest", collect_just_before)
    ref = store.publish(make_tree({"a": b"old"}), kind="plan", consume=True)
    assert read_tree(store.materialize(ref)) == {"a": b"old"}
