"""Where a store's bytes lie: a local folder, or any address that fsspec knows.

    Backend
    ├── LocalBackend     ``file:`` and plain paths: os calls, writes by rename
    └── RemoteBackend    in ``remote.py``: ``memory:``, ``s3:``, ``gs:``, … through fsspec

Paths are relative to the store's root, with forward slashes. Every write is atomic: a reader sees the whole
file or none.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from artifacts.errors import StoreUnavailableError, writing
from artifacts.hashing import Readable


@dataclass(frozen=True)
class Entry:
    """One stored file.

    Attributes:
        path: Relative path.
        size_bytes: Its size.
        modified: Seconds since 1970 of its last write; 0.0 where the file system does not say.
        stamp: Changes when the content changes (inode and time, or the ETag); None where there is no such thing.
    """

    path: str
    size_bytes: int
    modified: float
    stamp: str | None


class Backend(ABC):
    """What the store needs of a place.

    Attributes:
        url: The address, for people and for messages.
        is_local: Whether it is a `LocalBackend`.
    """

    url: str
    is_local: bool

    @abstractmethod
    def info(self, path: str) -> Entry | None:
        """Describes a file; None if there is none."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Returns a whole file.

        Raises:
            FileNotFoundError: If there is none.
        """

    @abstractmethod
    def open(self, path: str) -> AbstractContextManager[Readable]:
        """Opens a file for reading from start to end.

        Raises:
            FileNotFoundError: If there is none.
        """

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Writes a whole file, replacing an older one."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Writes a whole file unless there is one; returns whether it was written."""

    @abstractmethod
    def upload(self, local: Path, path: str) -> None:
        """Copies a local file, replacing an older one."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Removes a file; nothing happens if there is none."""

    @abstractmethod
    def walk(self, folder: str) -> Iterator[Entry]:
        """Yields all files below a folder, in no particular order; nothing if there is no such folder."""


class LocalBackend(Backend):
    """A folder of this machine (or of a file system mounted on it).

    Attributes:
        root: The folder; it need not exist yet.
    """

    is_local = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def path(self, path: str) -> Path:
        """Returns the absolute path of a stored file."""
        return self.root / path

    def info(self, path: str) -> Entry | None:
        """Describes a file; None if there is none."""
        with self._reading(path):
            try:
                status = os.stat(self.root / path)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return _entry(path, status) if stat.S_ISREG(status.st_mode) else None

    def read(self, path: str) -> bytes:
        """Returns a whole file."""
        with self._reading(path):
            return (self.root / path).read_bytes()

    def open(self, path: str) -> AbstractContextManager[Readable]:
        """Opens a file for reading from start to end."""
        with self._reading(path):
            return open(self.root / path, "rb", buffering=0)

    def write(self, path: str, data: bytes) -> None:
        """Writes a whole file, replacing an older one."""
        with writing(self.url), self._temporary(data) as temporary:
            os.replace(temporary, self._target(path))

    def create(self, path: str, data: bytes) -> bool:
        """Writes a whole file unless there is one; returns whether it was written."""
        with writing(self.url), self._temporary(data) as temporary:
            try:
                os.link(temporary, self._target(path))
            except FileExistsError:
                return False
            return True

    def upload(self, local: Path, path: str) -> None:
        """Copies a local file, replacing an older one."""
        self.write(path, local.read_bytes())

    def adopt(self, local: Path, path: str) -> Entry:
        """Moves a file of the same file system into the store, read-only and dated now.

        Raises:
            OSError: If it cannot be moved; errno EXDEV if it lies on another file system.
        """
        target = self._target(path)
        os.chmod(local, 0o444)
        os.utime(local)  # garbage collection spares what came lately; the file itself may be older
        os.replace(local, target)
        return _entry(path, os.stat(target))

    def remove(self, path: str) -> None:
        """Removes a file; nothing happens if there is none."""
        with writing(self.url), suppress(FileNotFoundError):
            os.unlink(self.root / path)

    def touch(self, path: str) -> Entry | None:
        """Dates a file now, so that garbage collection spares it; None if it is gone."""
        with writing(self.url):
            try:
                os.utime(self.root / path)
            except FileNotFoundError:
                return None
        return self.info(path)

    def walk(self, folder: str) -> Iterator[Entry]:
        """Yields all files below a folder, in no particular order."""
        with self._reading(folder):
            for place, _, names in os.walk(self.root / folder, onerror=_raise_unless_absent):
                for name in names:
                    path = Path(place, name).relative_to(self.root).as_posix()
                    if (entry := self.info(path)) is not None:
                        yield entry

    def _target(self, path: str) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    @contextmanager
    def _temporary(self, data: bytes) -> Iterator[Path]:
        temporary = self._target(f"tmp/{os.urandom(8).hex()}.part")
        try:
            temporary.write_bytes(data)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise StoreUnavailableError(
                f"Artifact store {self.url}: {path} may not be read ({error.strerror}). "
                "Give this user read permission, or use another store."
            ) from error


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _entry(path: str, status: os.stat_result) -> Entry:
    stamp = f"{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"
    return Entry(path, status.st_size, status.st_mtime, stamp)


def open_backend(url: str, **options: Any) -> Backend:
    """Opens a place by its address.

    Args:
        url: A path, ``file:`` address, or any fsspec address (``memory://…``, ``s3://bucket/prefix``, …).
        **options: Passed to the fsspec file system.

    Raises:
        StoreUnavailableError: If the address is empty, or its driver is not there.
    """
    if not url.strip():
        raise StoreUnavailableError("The address of the artifact store is empty; give a path or an fsspec address.")
    protocol, found, rest = url.partition(":")
    if found and protocol in ("file", "local"):
        if rest.startswith("//") and not rest.startswith("///"):
            # file://x/y would name the host x; people who write it mean a path
            rest = rest[2:]
        path = unquote(rest.removeprefix("//"))
    elif "://" in url or "::" in url:
        from artifacts.remote import RemoteBackend  # fsspec takes a tenth of a second to import

        return RemoteBackend(url, **options)
    else:
        path = url
    return LocalBackend(Path(os.path.abspath(os.path.expanduser(path))))
