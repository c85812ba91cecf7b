"""Full disks, missing permissions and killed processes: one clear error, and the store stays whole."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts import Store, StoreError, StoreUnavailableError, StoreWriteError
from artifacts.gc import collect
from tests.support.small_disk import small_disk

from .conftest import publish, read_tree, stored, write_files

BIG = bytes(range(256)) * 4096 * 3  # 3 MiB
FILES: dict[str, bytes | str] = {"big": BIG, "small": b"small"}
NOBODY = 65534


def assert_nothing_visible(store: Store, earlier: dict[str, bytes | str] | None = None) -> None:
    assert stored(store, "tmp") == []
    report = store.verify()
    assert report.problems == ()
    assert report.num_manifests == (1 if earlier else 0)


class FullDisk:
    """Lets so many bytes through, then fails like a full disk; patches the writes of files and of fsspec."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store, capacity_bytes: int) -> None:
        self._left = capacity_bytes
        if store.backend.is_local:
            monkeypatch.setattr("artifacts.publishing.hash_stream", self._wrap_sink)
        else:
            file_system = store.backend._fs  # type: ignore[attr-defined]
            for name in ("pipe_file", "put_file"):
                monkeypatch.setattr(file_system, name, self._refuse)

    def _wrap_sink(self, stream, *, sink, **options):  # type: ignore[no-untyped-def]
        from artifacts.hashing import hash_stream

        return hash_stream(stream, sink=sink and self._Sink(sink, self), **options)

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _refuse(self, *_: object, **__: object) -> None:
        self.take(1 << 30)

    class _Sink:
        def __init__(self, sink, disk):  # type: ignore[no-untyped-def]
            self.sink, self.disk = sink, disk

        def write(self, data: memoryview) -> int:
            self.disk.take(len(data))
            return self.sink.write(data)


def test_a_full_disk_while_publishing(store: Store, make_tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    earlier = {"earlier": b"here before"}
    publish(store, earlier)
    folder = make_tree(FILES)
    with monkeypatch.context() as patch:
        FullDisk(patch, store, 1 << 20)
        with pytest.raises(StoreWriteError, match=r"no space is left.*Free some space") as caught:
            store.publish(folder, kind="dataset", consume=False)
    assert store.url in str(caught.value)
    assert_nothing_visible(store, earlier)
    assert read_tree(folder) == FILES
    ref = store.publish(folder, kind="dataset", consume=True)
    assert read_tree(store.materialize(ref)) == FILES


def test_no_permission_while_publishing(store: Store, make_tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "the/place")

    folder = make_tree(FILES)
    with monkeypatch.context() as patch:
        if store.backend.is_local:
            patch.setattr("artifacts.backend.os.replace", refuse)
        else:
            for name in ("pipe_file", "put_file"):
                patch.setattr(store.backend._fs, name, refuse)  # type: ignore[attr-defined]
        with pytest.raises(StoreWriteError, match=r"not permitted.*write permission"):
            store.publish(folder, kind="dataset", consume=False)
    assert_nothing_visible(store)
    assert store.publish(folder, kind="dataset", consume=False).num_files == 2


@pytest.mark.parametrize("consume", [True, False])
def test_a_disk_that_is_really_full(tmp_path: Path, make_tree: Callable[..., Path], consume: bool):
    with small_disk(tmp_path / "disk", megabytes=2) as disk:
        store = Store.open(str(disk / "store"))
        publish(store, {"earlier": b"here before"})
        folder = make_tree(FILES)
        with pytest.raises(StoreWriteError, match="no space is left"):
            store.publish(folder, kind="dataset", consume=consume)
        assert_nothing_visible(store, {"earlier": b""})
        assert read_tree(folder)["big"] == BIG
        assert shutil.disk_usage(disk).free > 1 << 20, "the half-written copy is removed"


def test_a_disk_that_is_full_for_a_download(tmp_path: Path):
    with small_disk(tmp_path / "disk", megabytes=2) as disk:
        store = Store.open(f"memory://{tmp_path.name}-{os.urandom(4).hex()}", cache_dir=disk / "cache")
        (tmp_path / "tree").mkdir()
        write_files(tmp_path / "tree", FILES)
        ref = store.publish(tmp_path / "tree", kind="dataset", consume=False)
        with pytest.raises(StoreWriteError, match=r"cache.*no space is left"):
            store.materialize(ref)
        assert not [path for path in (disk / "cache" / "tmp").rglob("*") if path.is_file()]
        again = Store.open(store.url, cache_dir=tmp_path / "cache")
        assert read_tree(again.materialize(ref)) == FILES


def test_consuming_across_file_systems_copies(tmp_path: Path, file_store: Store):
    with small_disk(tmp_path / "disk", megabytes=8) as disk:
        write_files(disk, FILES)
        counts: list[int] = []
        ref = file_store.publish(disk, kind="dataset", consume=True, on_bytes=counts.append)
        assert list(disk.iterdir()) == []
        assert sum(counts) == ref.size_bytes
    assert read_tree(file_store.materialize(ref)) == FILES


def test_a_folder_on_another_file_system_gets_links_or_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with small_disk(tmp_path / "disk", megabytes=8) as disk:
        store = Store.open(str(disk / "store"))
        ref = publish(store, FILES)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        reader = Store.open(str(disk / "store"), cache_dir=tmp_path / "cache")
        folder = reader.materialize(ref)
        assert folder.is_relative_to(tmp_path / "cache")
        assert (folder / "big").is_symlink()
        assert read_tree(folder) == FILES
        (tmp_path / "tree").mkdir()
        write_files(tmp_path / "tree", {"new": b"new"})
        monkeypatch.setattr("artifacts.materialize.os.symlink", os.link)
        (folder).chmod(0o755)
        (folder / "big").unlink()
        assert read_tree(reader.materialize(ref)) == FILES
        assert not (folder / "big").is_symlink()
        with pytest.raises(StoreWriteError, match=r"not permitted \(Read-only file system\)"):
            reader.publish(tmp_path / "tree", kind="dataset", consume=False)


def test_the_file_size_limit_of_a_process(
    tmp_path: Path, make_tree: Callable[..., Path], run_python: Callable[..., subprocess.Popen[str]]
):
    code = (
        "import resource, signal, sys; from pathlib import Path; from artifacts import Store\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))\n"
        "Store.open(sys.argv[1]).publish(Path(sys.argv[2]), kind='dataset', consume=False)"
    )
    process = run_python(code, str(tmp_path / "store"), str(make_tree(FILES)))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "StoreWriteError" in errors.splitlines()[-1]
    assert "ulimit" in errors
    assert_nothing_visible(Store.open(str(tmp_path / "store")))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY


def test_a_user_without_write_permission_reads_but_does_not_write():
    # Not tmp_path: other users may not enter it.
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        store = Store.open(f"{place}/store")
        ref = publish(store, FILES)
        store.record("train", "a" * 64, {}, {"dataset": ref})
        for path in (store.backend.root, *store.backend.root.rglob("*")):  # type: ignore[attr-defined]
            path.chmod(path.stat().st_mode & 0o555 | (0o111 if path.is_dir() else 0))
        Path(place, "tree").mkdir()
        write_files(Path(place, "tree"), {"new": b"new"})
        user = os.geteuid()
        if user == 0:
            os.mkdir(f"{place}/cache", 0o700)
            os.chown(f"{place}/cache", NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            other = Store.open(f"{place}/store", cache_dir=Path(place, "cache"))
            assert other.lookup("train", "a" * 64) is not None
            assert read_tree(other.materialize(ref)) == FILES
            with pytest.raises(StoreWriteError, match="not permitted"):
                other.publish(Path(place, "tree"), kind="dataset", consume=False)
            with pytest.raises(StoreWriteError, match="not permitted"):
                other.record("train", "b" * 64, {}, {"dataset": ref})
            with pytest.raises(StoreWriteError, match="not permitted"), other.lock("train", "b" * 64):
                pass
        finally:
            os.seteuid(user)
            for path in (store.backend.root, *store.backend.root.rglob("*")):  # type: ignore[attr-defined]
                if path.is_dir():
                    path.chmod(0o755)


KILLED = """
import os
import sys
from pathlib import Path
from artifacts import Store
import artifacts.publishing as publishing

store = Store.open(sys.argv[1])
moment, consume = sys.argv[3], sys.argv[4] == "True"

def stop(*_):
    os.write(1, b"now\\n")  # in one piece: two files are published at a time
    sys.stdin.read()

if moment == "manifest":
    Store._write_manifest = stop
elif moment == "object":
    adopt = type(store.objects).adopt
    def adopt_one(self, *arguments):
        adopt(self, *arguments)
        stop()
    type(store.objects).adopt = adopt_one
store.publish(Path(sys.argv[2]), kind="dataset", consume=consume, on_bytes=stop if moment == "hash" else None)
"""


@pytest.mark.parametrize("consume", [True, False])
@pytest.mark.parametrize("moment", ["hash", "object", "manifest"])
def test_a_process_killed_while_publishing_leaves_a_whole_store(
    file_store: Store,
    make_tree: Callable[..., Path],
    run_python: Callable[..., subprocess.Popen[str]],
    moment: str,
    consume: bool,
):
    process = run_python(KILLED, file_store.url, str(make_tree(FILES)), moment, str(consume))
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    running = collect(file_store, dry_run=True, grace_seconds=0)
    assert running.scratch == [], "its owner is alive"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)

    report = file_store.verify()
    assert (report.problems, report.num_manifests) == ((), 0)
    ref = publish(file_store, FILES)
    assert read_tree(file_store.materialize(ref)) == FILES
    file_store.record("prepare_dataset", "a" * 64, {}, {"dataset": ref})
    assert len(collect(file_store, dry_run=False).scratch) == 1
    assert stored(file_store, "tmp") == []
    assert collect(file_store, dry_run=False, grace_seconds=0).objects == []


def test_two_processes_publish_the_same_at_the_same_time(
    file_store: Store, make_tree: Callable[..., Path], run_python: Callable[..., subprocess.Popen[str]]
):
    code = (
        "import sys; from pathlib import Path; from artifacts import Store\n"
        "store = Store.open(sys.argv[1]); print('ready', flush=True); sys.stdin.readline()\n"
        "for folder in sys.argv[2:]:\n"
        "    ref = store.publish(Path(folder), kind='dataset', consume=True); store.materialize(ref)\n"
        "print(ref.digest)"
    )
    files = {f"{number}": bytes([number]) * 200_000 for number in range(8)}
    processes = [run_python(code, file_store.url, *(str(make_tree(files)) for _ in range(3))) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    results = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        results.append(output)
    assert len(set(results)) == 1
    assert len(stored(file_store, "objects")) == 8
    assert file_store.verify().problems == ()
    assert read_tree(file_store.materialize(results[0].strip())) == files


def test_the_lock_of_a_killed_process_is_free(file_store: Store, run_python: Callable[..., subprocess.Popen[str]]):
    code = (
        "import sys; from artifacts import Store\n"
        "with Store.open(sys.argv[1]).lock('train', 'k'):\n    print('held', flush=True); sys.stdin.read()"
    )
    process = run_python(code, file_store.url)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    waited: list[float] = []

    def kill_then_wait(seconds: float) -> None:
        waited.append(seconds)
        process.kill()

    start = time.monotonic()
    with file_store.lock("train", "k", on_wait=kill_then_wait):
        assert waited
    assert time.monotonic() - start < 30
    process.communicate(timeout=60)


def test_an_s3_store_shows_other_processes_what_this_one_wrote_and_back(
    s3: str, tmp_path: Path, run_python: Callable[..., subprocess.Popen[str]]
):
    url = f"{s3}/{os.urandom(4).hex()}"
    store = Store.open(url, cache_dir=tmp_path / "cache")
    assert store.lookup("train", "k") is None
    code = (
        "import sys; from pathlib import Path; from artifacts import Store\n"
        "store = Store.open(sys.argv[1], cache_dir=Path(sys.argv[2]))\n"
        "with store.staging() as folder:\n"
        "    (folder / 'x').write_text('from elsewhere'); ref = store.publish(folder, kind='adapter', consume=True)\n"
        "store.record('train', 'k', {}, {'adapter': ref})"
    )
    process = run_python(code, url, str(tmp_path / "cache2"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    record = store.lookup("train", "k")
    assert record is not None
    assert read_tree(store.materialize(record.outputs["adapter"])) == {"x": b"from elsewhere"}


def test_addresses_that_do_not_work_say_so(
    s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_tree: Callable[..., Path]
):
    with pytest.raises(StoreUnavailableError, match="empty"):
        Store.open(" ")
    with pytest.raises(StoreUnavailableError, match="does not know this kind of address"):
        Store.open("nonsense://x")
    store = Store.open("s3://no-such-bucket/x", cache_dir=tmp_path / "cache")
    assert store.lookup("train", "k") is None
    with pytest.raises(StoreWriteError, match="no-such-bucket"):
        store.publish(make_tree({"a": b"a"}), kind="dataset", consume=False)

    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with pytest.raises(StoreUnavailableError, match=r"Check the address, the connection"):
        Store.open(f"{s3}/x", cache_dir=tmp_path / "cache", config_kwargs={"retries": {"max_attempts": 0}}).lookup(
            "train", "k"
        )


def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("artifacts.remote.url_to_fs", refuse)
    with pytest.raises(StoreUnavailableError, match="Install s3fs"):
        Store.open("s3://bucket/x")


def test_every_error_is_a_store_error():
    from artifacts import errors

    classes = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception)]
    assert len(classes) == 7
    assert all(issubclass(item, StoreError) and item.__name__ in str(errors.__doc__) for item in classes)
