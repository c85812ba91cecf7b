"""A store on any fsspec file system. Imports fsspec; the driver (s3fs, gcsfs, …) loads when it is first used."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from artifacts.backend import Backend, Entry
from artifacts.errors import StoreError, StoreUnavailableError, write_error
from artifacts.hashing import BUFFER_BYTES, Readable
from artifacts.patience import patient
from artifacts.redaction import without_secrets

# A put to these becomes visible as a whole, and they know no folders. Elsewhere: a temporary file, then a move.
_OBJECT_STORES = frozenset({"memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "obs"})

# Exceptions of drivers that are not OSErrors (no connection, no credentials) come from these packages.
_DRIVERS = frozenset(
    {"botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "azure", "adlfs", "requests", "paramiko"}
)

_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


class RemoteBackend(Backend):
    """A folder of an fsspec file system."""

    is_local = False
    has_answered = False

    def __init__(self, url: str, **options: Any) -> None:
        self.url = without_secrets(url.rstrip("/"))
        protocol = url.partition("://")[0]
        try:
            # Other processes write to the same store, so listings must not be remembered.
            self._fs, root = url_to_fs(url, use_listings_cache=False, **options)
        except ImportError as error:
            package = _EXTRAS.get(protocol, f"the fsspec driver of {protocol!r}")
            raise StoreUnavailableError(
                f"Artifact store {url}: its driver is not installed ({error}). Install {package}."
            ) from error
        except ValueError as error:
            raise StoreUnavailableError(
                f"Artifact store {url}: fsspec does not know this kind of address ({error}). "
                f"Use a path or one of {', '.join(sorted(set(fsspec.available_protocols()) & {'file', 'memory', 's3', 'gs', 'abfs', 'hf', 'sftp'}))}."
            ) from error
        self._root = root.rstrip("/")
        protocols = (self._fs.protocol,) if isinstance(self._fs.protocol, str) else tuple(self._fs.protocol)
        self.protocol = protocols[0]
        self._is_object_store = bool(_OBJECT_STORES.intersection(protocols))
        self._in_memory = "memory" in protocols

    @patient
    def info(self, path: str) -> Entry | None:
        """Describes a file; None if there is none."""
        with self._reading(path):
            try:
                found = self._fs.info(self._full(path))
            except (FileNotFoundError, NotADirectoryError):
                return None
        return _entry(path, found) if found["type"] == "file" else None

    @patient
    def read(self, path: str) -> bytes:
        """Returns a whole file."""
        with self._reading(path):
            return self._fs.cat_file(self._full(path))

    @patient
    def open(self, path: str) -> AbstractContextManager[Readable]:
        """Opens a file for reading from start to end."""
        with self._reading(path):
            if self._in_memory:  # its open() hands out one shared file with one position
                return io.BytesIO(self._fs.cat_file(self._full(path)))
            stream = self._fs.open(self._full(path), "rb", block_size=BUFFER_BYTES, cache_type="readahead")
        return _Guarded(stream, self, path)

    @patient
    def write(self, path: str, data: bytes) -> None:
        """Writes a whole file, replacing an older one."""
        with self._writing(path):
            self._put(path, lambda full: self._fs.pipe_file(full, data))

    @patient
    def create(self, path: str, data: bytes) -> bool:
        """Writes a whole file unless there is one; returns whether it was written.

        Exclusive where the file system can (S3, memory); elsewhere two writers may both believe they were first.
        """
        if self.info(path) is not None:
            return False
        with self._writing(path):
            try:
                if self._is_object_store:
                    self._fs.pipe_file(self._full(path), data, mode="create")
                else:
                    self._put(path, lambda full: self._fs.pipe_file(full, data))
            except FileExistsError:
                return False
        return True

    @patient
    def upload(self, local: Path, path: str) -> None:
        """Copies a local file, replacing an older one."""
        with self._writing(path):
            if self._in_memory:  # its put_file() shows the file while it grows
                self._fs.pipe_file(self._full(path), local.read_bytes())
            else:
                self._put(path, lambda full: self._fs.put_file(str(local), full))

    @patient
    def remove(self, path: str) -> None:
        """Removes a file; nothing happens if there is none."""
        with self._writing(path), suppress(FileNotFoundError):
            self._fs.rm_file(self._full(path))

    def walk(self, folder: str) -> Iterator[Entry]:
        """Yields all files below a folder, in no particular order."""
        for name, details in self._find(folder).items():
            yield _entry(self._fs._strip_protocol(name)[len(self._root) :].lstrip("/"), details)

    @patient
    def _find(self, folder: str) -> dict[str, dict[str, Any]]:
        with self._reading(folder):
            self._fs.invalidate_cache()
            try:
                return dict(self._fs.find(self._full(folder), detail=True))
            except (FileNotFoundError, NotADirectoryError):
                return {}

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _put(self, path: str, put: Any) -> None:
        full = self._full(path)
        if self._is_object_store:
            put(full)
            return
        temporary = self._full(f"tmp/{os.urandom(8).hex()}.part")
        for name in (temporary, full):
            self._fs.makedirs(name.rpartition("/")[0], exist_ok=True)
        try:
            put(temporary)
            self._fs.mv(temporary, full)
        except BaseException:
            with suppress(OSError):
                self._fs.rm_file(temporary)
            raise

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            if not _from_driver(error):
                raise
            raise StoreUnavailableError(
                f"Artifact store {self.url}: {path} cannot be read ({_named(error)}). "
                "Check the address, the connection, the credentials and the right to read."
            ) from error

    @contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_error(f"{self.url}/{path}", error) from error
        except Exception as error:
            if not _from_driver(error):
                raise
            raise StoreUnavailableError(
                f"Artifact store {self.url}: {path} cannot be written ({_named(error)}). "
                "Check the address, the connection and the credentials."
            ) from error


class _Guarded:
    """A stream whose reads wait for the store and raise its errors; what its user does between reads is not its business."""

    def __init__(self, stream: Any, backend: RemoteBackend, path: str) -> None:
        self._stream = stream
        self._backend = backend
        self._path = path
        self._position = 0
        self.url = backend.url
        self.has_answered = True  # it was opened

    @patient
    def readinto(self, buffer: bytearray, /) -> int | None:
        with self._backend._reading(self._path):
            if self._stream.tell() != self._position:  # a read failed half-way; what came of it was given to nobody
                self._stream.seek(self._position)
            count = self._stream.readinto(buffer)
        self._position += count or 0
        return count

    def __enter__(self) -> _Guarded:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _from_driver(error: Exception) -> bool:
    if isinstance(error, StoreError):
        return False
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _DRIVERS


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _entry(path: str, details: dict[str, Any]) -> Entry:
    size_bytes = int(details.get("size") or 0)
    modified = next(
        (
            details[name]
            for name in ("LastModified", "last_modified", "mtime", "updated", "created")
            if details.get(name)
        ),
        None,
    )
    if isinstance(modified, str):
        with suppress(ValueError):
            modified = datetime.fromisoformat(modified)
    seconds = (
        modified.timestamp()
        if isinstance(modified, datetime)
        else float(modified)
        if isinstance(modified, (int, float))
        else 0.0
    )
    tag = next((details[name] for name in ("ETag", "etag", "md5Hash", "content_md5") if details.get(name)), None)
    token = tag or (seconds or None)
    return Entry(path, size_bytes, seconds, f"{size_bytes}:{token}" if token else None)
