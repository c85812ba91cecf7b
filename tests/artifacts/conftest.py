"""Stores of three kinds, and what the tests of all of them need."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from artifacts import ArtifactRef, Store, objects
from artifacts.backend import LocalBackend
from artifacts.remote import RemoteBackend

ROOT = Path(__file__).parents[2]
BUCKET = "artifact-tests"


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """A private S3 server on this machine."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request hides what failed
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a bucket; the environment leads fsspec (also of child processes) to the private server."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    s3fs.S3FileSystem.clear_instance_cache()
    file_system = s3fs.S3FileSystem(use_listings_cache=False)
    if not file_system.exists(BUCKET):
        file_system.mkdir(BUCKET)
    yield f"s3://{BUCKET}"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["file", "memory", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty store of each kind."""
    name = uuid.uuid4().hex
    if request.param == "file":
        return (tmp_path / "store").as_uri()
    if request.param == "memory":
        return f"memory://{name}"
    return f"{request.getfixturevalue('s3')}/{name}"


@pytest.fixture
def reopen(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
    """Opens the store as a new process would: nothing has been verified yet, but stamps are there."""

    def open_again() -> Store:
        monkeypatch.setattr(objects, "_verified", set())
        return Store.open(store_url, cache_dir=tmp_path / "cache")

    return open_again


@pytest.fixture
def store(reopen: Callable[[], Store]) -> Store:
    """An empty store of each kind."""
    return reopen()


@pytest.fixture
def file_store(tmp_path: Path) -> Store:
    """An empty local store."""
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[..., Path]:
    """Writes folders of files."""

    def make(files: dict[str, bytes | str]) -> Path:
        folder = tmp_path / f"tree-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        write_files(folder, files)
        return folder

    return make


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts Python on some lines of code, in another process."""

    def start(code: str, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def write_files(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def publish(store: Store, files: dict[str, bytes | str], kind: str = "dataset", **options: object) -> ArtifactRef:
    with store.staging() as folder:
        write_files(folder, files)
        return store.publish(folder, kind=kind, consume=True, **options)  # type: ignore[arg-type]


def read_tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def stored(store: Store, folder: str) -> list[str]:
    return sorted(entry.path for entry in store.backend.walk(folder))


def flip_byte(store: Store, path: str, offset: int = 0, *, keep_time: bool = False) -> None:
    """Changes one bit of a stored file behind the store's back."""
    overwrite(store, path, lambda data: data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :], keep_time)


def overwrite(store: Store, path: str, change: Callable[[bytes], bytes], keep_time: bool = False) -> None:
    data = change(store.backend.read(path))
    if isinstance(store.backend, LocalBackend):
        local = store.backend.path(path)
        status = local.stat()
        local.chmod(0o644)
        with local.open("r+b") as stream:
            stream.truncate(len(data))
            stream.write(data)
        local.chmod(0o444)
        if keep_time:
            os.utime(local, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        assert isinstance(store.backend, RemoteBackend)
        store.backend.write(path, data)
