"""From a folder to objects: every file is read once, and hashed while it is read.

    local store, folder may be consumed   hash, then rename into ``objects/``
    local store, folder is kept           copy into ``tmp/`` while hashing, then rename into ``objects/``
    remote store                          hash, then upload what is not there yet

An object that is there already is read and compared before it is relied on; a wrong one is replaced.

Files are not flushed to the disk one by one (that would halve the speed). After a power failure a file may
therefore be incomplete; that is found when it is read, because every object is verified before use.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from artifacts.errors import InvalidArtifactError, StoreError, writing
from artifacts.hashing import OnBytes, Writable, hash_stream
from artifacts.manifest import FileEntry, check_path
from artifacts.objects import Objects, in_parallel
from artifacts.scratch import remove_tree


@dataclass(frozen=True)
class SourceFile:
    """A file to publish.

    Attributes:
        path: Path below the folder, with forward slashes.
        local: Where it lies.
        size_bytes: Its size when the folder was listed.
    """

    path: str
    local: Path
    size_bytes: int


def scan(directory: Path) -> list[SourceFile]:
    """Lists the files of a folder, largest first (so that the last one to finish is a small one).

    Raises:
        InvalidArtifactError: If there is no such folder or no file in it, or anything in it is neither a folder
            nor a regular file.
    """
    if not directory.is_dir():
        raise InvalidArtifactError(f"{directory} is not a folder; publish the folder that holds the artifact's files.")
    files = sorted(_scan(directory, ""), key=lambda file: (-file.size_bytes, file.path))
    if not files:
        raise InvalidArtifactError(f"{directory} holds no files; an artifact needs at least one.")
    return files


def _scan(directory: Path, prefix: str) -> Iterator[SourceFile]:
    with os.scandir(directory) as found:
        for item in found:
            path = check_path(f"{prefix}{item.name}")
            if item.is_symlink():
                raise InvalidArtifactError(
                    f"{item.path} is a symbolic link (to {os.readlink(item.path)}). An artifact holds its own files: "
                    "put a copy of the file there."
                )
            if item.is_dir(follow_symlinks=False):
                yield from _scan(Path(item.path), f"{path}/")
            elif item.is_file(follow_symlinks=False):
                yield SourceFile(path, Path(item.path), item.stat(follow_symlinks=False).st_size)
            else:
                raise InvalidArtifactError(f"{item.path} is neither a folder nor a regular file; remove it.")


class Ingest:
    """Brings the files of one folder into a store.

    Args:
        objects: The store's objects.
        scratch: A folder on the store's file system (local stores).
        consume: Whether the files may be moved away.
        on_bytes: Called with the number of bytes of each piece that was hashed.
    """

    def __init__(self, objects: Objects, scratch: Path, *, consume: bool, on_bytes: OnBytes | None) -> None:
        self._objects = objects
        self._scratch = scratch
        self._consume = consume
        self._on_bytes = on_bytes
        self._guard = threading.Lock()
        self._placing: dict[str, threading.Lock] = {}
        self._reused: list[tuple[str, Path]] = []

    def run(self, files: list[SourceFile]) -> list[FileEntry]:
        """Stores all files and returns their entries.

        Raises:
            StoreWriteError: If the store cannot be written.
            InvalidArtifactError: If a file cannot be read, or changes while it is read.
        """
        work = self._into_local if self._objects.backend.is_local else self._into_remote
        return in_parallel(work, files)

    def restore_reused(self) -> None:
        """Uploads again what was found in a remote store before, but has been garbage-collected since."""
        for digest, local in self._reused:
            if self._objects.problem(digest, local.stat().st_size, full=False) is not None:
                self._objects.upload(local, digest)

    def _into_local(self, file: SourceFile, stop: threading.Event) -> FileEntry:
        with writing(self._objects.backend.url):
            # A file with another name elsewhere could be changed through it, so it is copied.
            if self._consume and os.stat(file.local).st_nlink == 1:
                digest, size_bytes = self._hash(file, None, self._on_bytes, stop)
                try:
                    self._place(file.local, digest, size_bytes)
                    return FileEntry(file.path, size_bytes, digest)
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                digest, size_bytes, copy = self._copy(file, None, stop)  # its bytes were reported already
            else:
                digest, size_bytes, copy = self._copy(file, self._on_bytes, stop)
            self._place(copy, digest, size_bytes)
            copy.unlink(missing_ok=True)
            return FileEntry(file.path, size_bytes, digest)

    def _into_remote(self, file: SourceFile, stop: threading.Event) -> FileEntry:
        digest, size_bytes = self._hash(file, None, self._on_bytes, stop)
        with self._one_at_a_time(digest):
            if self._objects.problem(digest, size_bytes, full=True, stop=stop) is None:
                self._reused.append((digest, file.local))
            else:
                self._objects.upload(file.local, digest)
        return FileEntry(file.path, size_bytes, digest)

    def _copy(self, file: SourceFile, on_bytes: OnBytes | None, stop: threading.Event) -> tuple[str, int, Path]:
        copy = self._scratch / os.urandom(8).hex()
        with open(copy, "wb") as sink:
            digest, size_bytes = self._hash(file, sink, on_bytes, stop)
        return digest, size_bytes, copy

    def _hash(
        self, file: SourceFile, sink: Writable | None, on_bytes: OnBytes | None, stop: threading.Event
    ) -> tuple[str, int]:
        try:
            source = file.local.open("rb", buffering=0)
        except OSError as error:
            raise InvalidArtifactError(f"{file.local} cannot be read, so it cannot be published: {error}.") from error
        with source as stream:
            before = os.fstat(stream.fileno())
            digest, size_bytes = hash_stream(stream, sink=sink, on_bytes=on_bytes, stop=stop)
            after = os.fstat(stream.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or size_bytes != after.st_size:
            raise InvalidArtifactError(
                f"{file.local} changed while it was being published. Close all files of an artifact before publishing it."
            )
        return digest, size_bytes

    def _place(self, local: Path, digest: str, size_bytes: int) -> None:
        with self._one_at_a_time(digest):
            problem = self._objects.problem(digest, size_bytes, full=True)
            if problem is None and self._objects.keep(digest):
                return
            if problem not in (None, "is missing"):
                self._objects.discard(digest, problem)
            self._objects.adopt(local, digest)

    def _one_at_a_time(self, digest: str) -> threading.Lock:
        # The same content twice in one folder: the second file finds the first.
        with self._guard:
            return self._placing.setdefault(digest, threading.Lock())


def empty_folder(directory: Path) -> None:
    """Removes what is left of a consumed folder, apart from the folder itself.

    Raises:
        StoreError: If something cannot be removed.
    """
    try:
        for path in directory.iterdir():
            remove_tree(path)
    except OSError as error:
        raise StoreError(
            f"The artifact was published, but its folder {directory} cannot be emptied ({error}). Remove it by hand."
        ) from error
