"""Objects: files named by the sha256 of their bytes, verified before they are used.

Two checks, a cheap one and a full one. The full one reads and hashes every byte, once per process. The cheap
one compares the size, and the *stamp* (inode and time of a local file, ETag of a remote one) with the stamp
under which the object was last found good; only if that differs are the bytes read. Stamps are kept in a
local folder; they are a cache, and losing them costs time only.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from artifacts.backend import Backend, Entry, LocalBackend
from artifacts.errors import StoreWriteError, writing
from artifacts.hashing import NUM_WORKERS, OnBytes, StoppedError, hash_stream

T = TypeVar("T")
R = TypeVar("R")

_log = logging.getLogger("artifacts")

# (address, digest, stamp) of objects whose bytes this process has read and found right.
_verified: set[tuple[str, str, str]] = set()
# What a process that lives for months may remember of it: 25 MB. Whatever is forgotten is read once more.
_MOST_VERIFIED = 1 << 16


def object_path(digest: str) -> str:
    """Returns where an object lies, relative to the store's root."""
    return f"objects/{digest[:2]}/{digest}"


class Objects:
    """The objects of one place.

    Attributes:
        backend: The place.
    """

    def __init__(self, backend: Backend, stamps_dir: Path | None) -> None:
        self.backend = backend
        self._stamps_dir = stamps_dir

    def problem(
        self,
        digest: str,
        size_bytes: int,
        *,
        full: bool,
        again: bool = False,
        on_bytes: OnBytes | None = None,
        stop: threading.Event | None = None,
    ) -> str | None:
        """Checks an object.

        Args:
            digest: Its digest.
            size_bytes: The size that it must have.
            full: Whether every byte must have been read by this process; otherwise a known stamp is enough
                (and a remote object without one is taken by its size).
            again: Whether to read it even if this process has read it before.
            on_bytes: Called with numbers of bytes that add up to ``size_bytes`` if the object is good.
            stop: Gives the check up when set.

        Returns:
            None if the object is good, ``"is missing"``, or what is wrong with it.
        """
        entry = self.backend.info(object_path(digest))
        if entry is None:
            return "is missing"
        if entry.size_bytes != size_bytes:
            return f"has {entry.size_bytes} bytes instead of {size_bytes}"
        if not again and self._is_known(digest, entry, full=full):
            if on_bytes is not None:
                on_bytes(size_bytes)
            return None
        try:
            with self.backend.open(entry.path) as stream:
                found, _ = hash_stream(stream, on_bytes=on_bytes, stop=stop)
        except FileNotFoundError:
            return "is missing"
        if found != digest:
            return f"holds other bytes (their sha256 is {found[:12]}…)"
        self.mark_good(digest, entry)
        return None

    def _is_known(self, digest: str, entry: Entry, *, full: bool) -> bool:
        if entry.stamp is not None and (self.backend.url, digest, entry.stamp) in _verified:
            return True
        if full:
            return False
        known = self._stamp(digest)
        return known == entry.stamp if known is not None else not self.backend.is_local

    def mark_good(self, digest: str, entry: Entry) -> None:
        """Remembers that the bytes of an object, in the state that the entry describes, are right."""
        if entry.stamp is None:
            return
        if len(_verified) >= _MOST_VERIFIED:
            _verified.clear()
        _verified.add((self.backend.url, digest, entry.stamp))
        if self._stamps_dir is None or self._stamp(digest) == entry.stamp:
            return
        path = self._stamps_dir / digest[:2] / digest
        temporary = path.with_name(f"{digest}.{os.urandom(4).hex()}")
        with suppress(OSError):  # a folder that cannot be written only costs time
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(entry.stamp)
            os.replace(temporary, path)

    def _stamp(self, digest: str) -> str | None:
        if self._stamps_dir is None:
            return None
        with suppress(OSError, UnicodeDecodeError):
            return (self._stamps_dir / digest[:2] / digest).read_text()
        return None

    def forget(self, digest: str) -> None:
        """Drops the stamp of an object that was removed."""
        if self._stamps_dir is not None:
            with suppress(OSError):
                (self._stamps_dir / digest[:2] / digest).unlink(missing_ok=True)

    def discard(self, digest: str, why: str) -> None:
        """Removes a corrupt object, so that it is made again; a store that cannot be written keeps it."""
        _log.warning("Removed the object %s of %s, because it %s.", digest[:12], self.backend.url, why)
        self.forget(digest)
        try:
            self.backend.remove(object_path(digest))
        except StoreWriteError as error:
            _log.warning("It could not be removed: %s", error)

    def adopt(self, local: Path, digest: str) -> None:
        """Moves a file, whose bytes were just hashed, into a local place.

        Raises:
            StoreWriteError: If the place cannot be written.
            OSError: With errno EXDEV, if the file lies on another file system.
        """
        assert isinstance(self.backend, LocalBackend)
        self.mark_good(digest, self.backend.adopt(local, object_path(digest)))

    def keep(self, digest: str) -> bool:
        """Dates a good local object now, so that garbage collection spares it; False if it is gone."""
        assert isinstance(self.backend, LocalBackend)
        entry = self.backend.touch(object_path(digest))
        if entry is None:
            return False
        self.mark_good(digest, entry)
        return True

    def upload(self, local: Path, digest: str) -> None:
        """Copies a file, whose bytes were just hashed, into a remote place.

        Raises:
            StoreWriteError: If the place cannot be written.
        """
        self.backend.upload(local, object_path(digest))
        if (entry := self.backend.info(object_path(digest))) is not None:
            self.mark_good(digest, entry)

    def download(
        self, digest: str, target: Path, *, on_bytes: OnBytes | None, stop: threading.Event | None
    ) -> str | None:
        """Copies an object to a local file while hashing it.

        Args:
            digest: The object.
            target: The file; it is written also when the object turns out to be wrong.
            on_bytes: Called with the number of bytes of each piece.
            stop: Gives the copy up when set.

        Returns:
            None if the bytes were right, or what is wrong with the object.

        Raises:
            StoreWriteError: If the target cannot be written.
            StoreUnavailableError: If the object cannot be read.
        """
        try:
            source = self.backend.open(object_path(digest))
        except FileNotFoundError:
            return "is missing"
        with source as stream, writing(str(target.parent)), open(target, "wb") as sink:
            found, _ = hash_stream(stream, sink=sink, on_bytes=on_bytes, stop=stop)
        return None if found == digest else f"holds other bytes (their sha256 is {found[:12]}…)"


def in_parallel(work: Callable[[T, threading.Event], R], items: Iterable[T]) -> list[R]:
    """Runs work on several items at a time, in threads, and returns the results in order.

    At the first error the other items are given up (the event passed to ``work`` is set) and it is raised.
    """
    items = list(items)
    stop = threading.Event()
    if len(items) == 1:
        return [work(items[0], stop)]
    with ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="artifacts") as pool:
        futures = [pool.submit(work, item, stop) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # also on an interrupt; after success there is nothing left to stop
            stop.set()
            for future in futures:
                future.cancel()
    failures = [error for future in futures if not future.cancelled() and (error := future.exception()) is not None]
    for error in failures:
        if not isinstance(error, StoppedError):
            raise error
    return [future.result() for future in futures]
