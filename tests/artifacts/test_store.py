"""What a store does, on every kind of address."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from artifacts import (
    ArtifactRef,
    CorruptObjectError,
    InvalidArtifactError,
    NotFoundError,
    Store,
    UnhashableError,
    hashing,
    objects,
)
from artifacts.backend import LocalBackend
from artifacts.manifest import manifest_path
from artifacts.objects import object_path

from .conftest import flip_byte, overwrite, publish, read_tree, stored

FILES: dict[str, bytes | str] = {
    "model/weights.safetensors": bytes(range(256)) * 40,
    "model/config.json": '{"a": 1}',
    "processor/vocab.txt": "á β 中",
    "empty": b"",
}
BYTES = {name: content.encode() if isinstance(content, str) else content for name, content in FILES.items()}
KEY = "ab" * 32
DOCUMENT = {"unit": "load_model", "version": 1, "code": "c", "config": {}, "inputs": {}, "sources": {}}


def recorded(store: Store, files: dict[str, bytes | str] = FILES) -> ArtifactRef:
    ref = publish(store, files, kind="checkpoint")
    store.record("load_model", KEY, DOCUMENT, {"checkpoint": ref}, {"seconds": 1.5})
    return ref


def entry_path(store: Store, ref: ArtifactRef, name: str) -> str:
    return object_path(store.manifest(ref).file(name).sha256)


@pytest.mark.parametrize("consume", [True, False])
def test_a_published_folder_comes_back_byte_for_byte(store: Store, make_tree: Callable[..., Path], consume: bool):
    folder = make_tree(FILES)
    ref = store.publish(
        folder, kind="checkpoint", metadata={"family": "qwen2_vl"}, provenance={"by": "me"}, consume=consume
    )
    assert (ref.kind, ref.size_bytes, ref.num_files) == ("checkpoint", sum(map(len, BYTES.values())), 4)
    assert read_tree(store.materialize(ref)) == BYTES
    assert read_tree(folder) == ({} if consume else BYTES)
    manifest = store.manifest(ref)
    assert manifest.metadata == {"family": "qwen2_vl"}
    assert manifest.provenance["by"] == "me"
    assert set(store.digests()) == {ref.digest}


def test_the_digest_depends_on_content_kind_and_metadata_only(store: Store, make_tree: Callable[..., Path]):
    def digest(files: dict[str, bytes | str] = FILES, kind: str = "dataset", **options: object) -> str:
        return store.publish(make_tree(files), kind=kind, consume=False, **options).digest  # type: ignore[arg-type]

    same = digest()
    assert digest(dict(reversed(FILES.items())), provenance={"host": "elsewhere"}) == same
    others = [digest(kind="plan"), digest(metadata={"a": 1}), digest({**FILES, "empty": b"x"}), digest({"other": b""})]
    assert len({same, *others}) == 5


def test_content_is_stored_once(store: Store):
    publish(store, {"a": b"same", "b": b"same"})
    publish(store, {"c": b"same", "d": b"other"})
    assert len(stored(store, "objects")) == 2
    assert stored(store, "tmp") == []


def test_publishing_repairs_a_corrupt_object_instead_of_relying_on_it(store: Store):
    ref = publish(store, FILES)
    flip_byte(store, entry_path(store, ref, "model/config.json"), keep_time=False)
    assert publish(store, FILES) == ref
    assert read_tree(store.materialize(ref)) == BYTES


def test_publishing_repairs_a_corrupt_manifest(store: Store):
    ref = publish(store, FILES)
    flip_byte(store, manifest_path(ref.digest), 40)
    assert publish(store, FILES) == ref
    assert store.manifest(ref).ref == ref


def test_the_first_provenance_stays(store: Store):
    ref = publish(store, FILES, provenance={"producer": "first"})
    publish(store, FILES, provenance={"producer": "second"})
    assert store.manifest(ref).provenance["producer"] == "first"


def test_progress_adds_up(store: Store, reopen: Callable[[], Store], make_tree: Callable[..., Path]):
    files = {**FILES, "twin": FILES["model/weights.safetensors"]}
    for consume in (False, True):
        counts: list[int] = []
        ref = store.publish(make_tree(files), kind="dataset", consume=consume, on_bytes=counts.append)
        assert sum(counts) == ref.size_bytes
    for again in (reopen(), reopen()):
        counts = []
        again.materialize(ref, on_bytes=counts.append)
        assert sum(counts) == ref.size_bytes


def test_lookup_finds_what_was_recorded(store: Store, reopen: Callable[[], Store]):
    assert store.lookup("load_model", KEY) is None
    ref = recorded(store)
    record = reopen().lookup("load_model", KEY)
    assert record is not None
    assert record.outputs == {"checkpoint": ref}
    assert (record.document, record.info, record.unit, record.key) == (DOCUMENT, {"seconds": 1.5}, "load_model", KEY)
    assert store.lookup("load_model", "cd" * 32) is None
    assert store.lookup("train", KEY) is None
    assert reopen().lookup("load_model", KEY, full=True) == record


def test_records_are_newest_first_and_limited(store: Store):
    ref = publish(store, FILES)
    for number in range(4):
        store.record("train", f"{number:064x}", {**DOCUMENT, "version": number}, {"adapter": ref})
    versions = [record.document["version"] for record in store.records("train")]
    assert versions == [3, 2, 1, 0]
    assert store.records("export") == []


def test_a_record_of_an_unpublished_artifact_is_refused(store: Store):
    with pytest.raises(NotFoundError, match="Publish it before"):
        store.record("train", KEY, DOCUMENT, {"adapter": ArtifactRef("adapter", KEY, 1, 1)})


@pytest.mark.parametrize("name", ["model/weights.safetensors", "model/config.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_object_is_a_miss_and_is_made_again(
    store: Store, reopen: Callable[[], Store], name: str, damage: str, caplog: pytest.LogCaptureFixture
):
    ref = recorded(store)
    path = entry_path(store, ref, name)
    if damage == "flip":
        flip_byte(store, path, 3)
    elif damage == "truncate":
        overwrite(store, path, lambda data: data[:-1])
    else:
        store.backend.remove(path)
    with caplog.at_level(logging.WARNING, "artifacts"):
        found = reopen().check("load_model", KEY)
    assert found.record is None
    assert len(found.problems) == 1
    assert name in found.problems[0]
    assert store.backend.info(path) is None, "what is corrupt is removed"
    assert len([line for line in caplog.records if line.name == "artifacts"]) == (damage != "remove")
    assert recorded(store) == ref
    assert reopen().lookup("load_model", KEY, full=True) is not None


def test_a_flipped_byte_that_leaves_no_trace_is_found_before_use(store: Store, reopen: Callable[[], Store]):
    ref = recorded(store)
    path = entry_path(store, ref, "model/weights.safetensors")
    flip_byte(store, path, 1000, keep_time=True)
    with pytest.raises(CorruptObjectError, match=r"model/weights\.safetensors.*run the step") as caught:
        reopen().materialize(ref)
    assert caught.value.artifact == ref.digest
    assert path.endswith(caught.value.digest)
    assert store.backend.info(path) is None
    with pytest.raises(NotFoundError, match="missing"):
        reopen().materialize(ref)
    assert recorded(store) == ref
    assert read_tree(reopen().materialize(ref)) == BYTES


@pytest.mark.parametrize("position", [0.0, 0.3, 0.6, 0.999])
def test_any_flipped_byte_of_a_manifest_is_found(store: Store, reopen: Callable[[], Store], position: float):
    ref = recorded(store)
    path = manifest_path(ref.digest)
    flip_byte(store, path, int(position * len(store.backend.read(path))))
    found = reopen().check("load_model", KEY)
    assert found.record is None
    assert "manifest" in found.problems[0]
    with pytest.raises(NotFoundError, match="no artifact"):
        store.manifest(ref)
    assert recorded(store) == ref
    assert reopen().lookup("load_model", KEY) is not None


@pytest.mark.parametrize("position", [0.0, 0.3, 0.6, 0.999])
def test_any_flipped_byte_of_an_index_record_is_found(store: Store, reopen: Callable[[], Store], position: float):
    recorded(store)
    path = store.index.path("load_model", KEY)
    flip_byte(store, path, int(position * len(store.backend.read(path))))
    assert reopen().records("load_model") == []
    found = reopen().check("load_model", KEY)
    assert found.record is None
    assert "index record" in found.problems[0]
    assert store.backend.info(path) is None
    recorded(store)
    assert reopen().lookup("load_model", KEY) is not None


def test_a_valid_record_under_another_key_is_refused(store: Store):
    recorded(store)
    other = "cd" * 32
    store.backend.write(store.index.path("load_model", other), store.backend.read(store.index.path("load_model", KEY)))
    assert store.check("load_model", other).problems


def test_lookup_reads_an_object_only_if_its_stamp_changed(
    store: Store, reopen: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
):
    ref = recorded(store)
    read: list[str] = []
    original = type(store.backend).open
    monkeypatch.setattr(type(store.backend), "open", lambda self, path: read.append(path) or original(self, path))
    assert reopen().lookup("load_model", KEY) is not None
    assert read == []
    path = entry_path(store, ref, "model/config.json")
    if isinstance(store.backend, LocalBackend):
        os.utime(store.backend.path(path), (1, 1))
    else:
        flip_byte(store, path)
        assert reopen().lookup("load_model", KEY) is None
    assert reopen().lookup("load_model", KEY) is not None or not store.backend.is_local
    assert read == [path]


def test_what_is_remembered_of_verified_objects_is_bounded(file_store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objects, "_verified", set())
    monkeypatch.setattr(objects, "_MOST_VERIFIED", 3)
    refs = [publish(file_store, {"own": f"{number}"}) for number in range(8)]
    assert len(objects._verified) <= 3
    for number, ref in enumerate(refs):
        assert read_tree(file_store.materialize(ref)) == {"own": f"{number}".encode()}


def test_read_text(store: Store, reopen: Callable[[], Store]):
    ref = recorded(store)
    assert store.read_text(ref, "processor/vocab.txt") == "á β 中"
    with pytest.raises(NotFoundError, match=r"no file 'nothing\.json'.*model/config\.json"):
        store.read_text(ref, "nothing.json")
    flip_byte(store, entry_path(store, ref, "model/config.json"), keep_time=True)
    with pytest.raises(CorruptObjectError, match=r"model/config\.json"):
        reopen().read_text(ref, "model/config.json")
    with pytest.raises(NotFoundError, match="missing"):
        reopen().read_text(ref, "model/config.json")


def test_a_materialized_folder_is_read_only_and_mended(store: Store, reopen: Callable[[], Store]):
    ref = recorded(store)
    folder = store.materialize(ref)
    assert all(path.stat().st_mode & 0o222 == 0 for path in [folder, *folder.rglob("*")])
    for place in (folder, folder / "model"):
        place.chmod(0o755)
    (folder / "stray.json").write_text("{}")
    (folder / "model/config.json").unlink()
    (folder / "empty").unlink()
    (folder / "empty").write_bytes(b"not empty")
    assert store.materialize(ref) == folder
    assert read_tree(folder) == BYTES
    for path in sorted((folder / "processor").iterdir()):
        (folder / "processor").chmod(0o755)
        path.unlink()
    (folder / "processor").rmdir()
    assert read_tree(reopen().materialize(ref)) == BYTES


def test_many_threads_may_mend_the_same_folder(store: Store):
    ref = recorded(store)
    folder = store.materialize(ref)
    for _ in range(5):
        for place in (folder, folder / "model"):
            place.chmod(0o755)
        (folder / "stray").write_bytes(b"")
        (folder / "empty").unlink()
        (folder / "model/config.json").unlink()
        (folder / "model/config.json").write_text("{}")
        with ThreadPoolExecutor(6) as pool:
            assert set(pool.map(store.materialize, [ref] * 6)) == {folder}
        assert read_tree(folder) == BYTES


def test_a_corrupt_local_copy_of_a_remote_object_is_fetched_again(store: Store, reopen: Callable[[], Store]):
    ref = recorded(store)
    folder = store.materialize(ref)
    copy = store.local_objects.backend
    assert (copy is store.backend) == store.backend.is_local
    if store.backend.is_local:
        return  # a local store has no second copy: test_a_flipped_byte_that_leaves_no_trace_is_found_before_use
    flip_byte(Store.open(copy.url), entry_path(store, ref, "model/config.json"), keep_time=True)
    assert reopen().materialize(ref) == folder
    assert read_tree(folder) == BYTES


def test_many_threads_may_materialize_and_publish_the_same(store: Store, make_tree: Callable[..., Path]):
    folders = [make_tree(FILES) for _ in range(6)]

    def work(folder: Path) -> tuple[ArtifactRef, dict[str, bytes]]:
        ref = store.publish(folder, kind="checkpoint", consume=True)
        return ref, read_tree(store.materialize(ref))

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(work, folders))
    assert results == [results[0]] * 6
    assert results[0][1] == BYTES
    assert len(stored(store, "objects")) == 4


def test_what_cannot_be_an_artifact_is_refused(store: Store, make_tree: Callable[..., Path]):
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(InvalidArtifactError, match=match):
            store.publish(folder, kind="dataset", consume=True)

    good: dict[str, bytes | str] = {"a": b"a"}
    folder = make_tree(good)
    (folder / "link").symlink_to("a")
    refused(folder, "link is a symbolic link")
    folder = make_tree(good)
    (folder / "up").symlink_to("..")
    refused(folder, "up is a symbolic link")
    folder = make_tree(good)
    os.mkfifo(folder / "pipe")
    refused(folder, "pipe is neither")
    folder = make_tree({})
    refused(folder, "no files")
    (folder / "inner").mkdir()
    refused(folder, "no files")
    refused(folder / "nothing", "not a folder")
    refused(make_tree({"new\nline": b""}), "unprintable")
    refused(make_tree({"back\\slash": b""}), "backslash")
    folder = make_tree(good)
    with pytest.raises(UnhashableError, match=r"metadata|path"):
        store.publish(folder, kind="dataset", metadata={"path": Path("x")}, consume=False)
    with pytest.raises(ValueError, match="kind"):
        store.publish(folder, kind="a/b", consume=False)
    assert read_tree(folder) == {"a": b"a"}
    assert list(store.digests()) == []
    assert stored(store, "tmp") == []


def test_a_file_that_grows_while_it_is_published_is_refused(
    store: Store, make_tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    folder = make_tree({"log": b"1" * 1000})
    monkeypatch.setattr(hashing, "BUFFER_BYTES", 100)

    def grow(_: int) -> None:
        with (folder / "log").open("ab") as stream:
            stream.write(b"2")

    for consume in (True, False):
        calls = iter([grow])
        with pytest.raises(InvalidArtifactError, match="changed while"):
            store.publish(
                folder, kind="dataset", consume=consume, on_bytes=lambda n, calls=calls: next(calls, len)(n and b"")
            )
    assert list(store.digests()) == []


def test_a_staging_folder_is_removed_also_after_an_error(store: Store):
    with pytest.raises(RuntimeError, match="stop"), store.staging() as folder:  # noqa: PT012
        (folder / "x").write_bytes(b"x")
        raise RuntimeError("stop")
    assert not folder.exists()
    assert list((store.work_dir / "tmp").iterdir()) == []


def test_an_interrupt_while_publishing_leaves_nothing_visible(store: Store, make_tree: Callable[..., Path]):
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.publish(make_tree(FILES), kind="dataset", consume=False, on_bytes=interrupt)
    assert list(store.digests()) == []
    assert not list((store.work_dir / "tmp").glob("*"))
    assert publish(store, FILES).num_files == 4


def test_the_lock_is_exclusive_and_reports_waiting(store: Store):
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        with store.lock("train", KEY, on_wait=lambda seconds: waiting.set()):
            order.append("second")

    with store.lock("train", KEY), store.lock("train", "cd" * 32):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]

    class GiveUpError(Exception):
        pass

    def give_up(seconds: float) -> None:
        raise GiveUpError

    with store.lock("train", KEY), pytest.raises(GiveUpError), store.lock("train", KEY, on_wait=give_up):
        order.append("never")
    with store.lock("train", KEY):
        order.append("third")
    assert order == ["first", "second", "third"]


def test_names_that_would_leave_the_store_are_refused(store: Store):
    for name in ("../x", "a/b", "", ".hidden"):
        with pytest.raises(ValueError, match="cannot name"):
            store.lookup(name, KEY)
        with pytest.raises(ValueError, match="cannot name"):
            store.lock("train", name)
    with pytest.raises(ValueError, match="digest"):
        store.manifest("../../etc/passwd")
