"""Locks that keep two processes from doing the same work twice. They only save work; results are safe without.

local folder   ``flock``: the kernel frees it when its holder dies, however it dies
memory         a lock of this process
anything else  a lease: an object with an owner and an expiry, renewed while it is held, taken over when expired, or
               when nobody has renewed it for as long by the waiter's own clock: that of a dead holder may have been wrong
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from artifacts.backend import Backend, LocalBackend
from artifacts.errors import StoreError, writing

OnWait = Callable[[float], object]

LEASE_SECONDS = 60.0

_FIRST_PAUSE_SECONDS = 0.02
_LONGEST_PAUSE_SECONDS = 0.5
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})

_log = logging.getLogger("artifacts")
_process_locks: dict[str, threading.Lock] = {}
_process_locks_guard = threading.Lock()


@contextmanager
def store_lock(
    backend: Backend, name: str, *, on_wait: OnWait | None = None, lease_seconds: float = LEASE_SECONDS
) -> Iterator[None]:
    """Holds the lock of a name in a store.

    Args:
        backend: The store's place.
        name: What is locked, such as ``train-<key>``.
        on_wait: Called again and again with the seconds waited so far while somebody else holds the lock; an
            exception from it ends the wait.
        lease_seconds: How long a lease outlives a holder that died (not local folders and memory).

    Raises:
        StoreWriteError: If the lock cannot be written.
    """
    if isinstance(backend, LocalBackend):
        with file_lock(backend.root / "locks" / f"{name}.lock", on_wait=on_wait):
            yield
    elif backend.url.startswith("memory:"):
        with _process_locks_guard:
            lock = _process_locks.setdefault(f"{backend.url} {name}", threading.Lock())
        _wait_until(lambda: lock.acquire(blocking=False), on_wait)
        try:
            yield
        finally:
            lock.release()
    else:
        with _lease(backend, f"leases/{name}.json", lease_seconds, on_wait):
            yield


@contextmanager
def file_lock(path: Path, *, shared: bool = False, on_wait: OnWait | None = None) -> Iterator[None]:
    """Holds a ``flock`` on a file, which is made if it is not there.

    Args:
        path: The file.
        shared: Whether others may hold it, shared, at the same time.
        on_wait: As in `store_lock`.

    Raises:
        StoreWriteError: If the file cannot be made.
    """
    descriptor = -1

    def acquire() -> bool:
        nonlocal descriptor
        with writing(str(path.parent)):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX) and _is_at(descriptor, path):
            return True
        os.close(descriptor)
        descriptor = -1
        return False

    _wait_until(acquire, on_wait)
    try:
        yield
    finally:
        # Unlock first: a child process may have inherited the descriptor, and would keep the lock.
        with suppress(OSError):  # where there are no locks
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def remove_if_free(path: Path, *, dry_run: bool = False) -> bool:
    """Removes a lock file that nobody holds; returns whether it was (or would be) removed."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        if not _flock(descriptor, fcntl.LOCK_EX):
            return False
        if not dry_run:
            path.unlink(missing_ok=True)  # whoever opened it meanwhile sees that it is gone, and makes it anew
        return True
    finally:
        os.close(descriptor)


def _flock(descriptor: int, mode: int) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        # Some network file systems know no locks; then work may be done twice, and nothing worse.
        _log.debug("No file locks here: %s", error)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False  # removed by garbage collection between open and lock


def _wait_until(acquire: Callable[[], bool], on_wait: OnWait | None) -> None:
    start = time.monotonic()
    pause = _FIRST_PAUSE_SECONDS
    while not acquire():
        if on_wait is not None:
            on_wait(time.monotonic() - start)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


@contextmanager
def _lease(backend: Backend, path: str, lease_seconds: float, on_wait: OnWait | None) -> Iterator[None]:
    owner = f"{socket.gethostname()}:{os.getpid()}:{os.urandom(8).hex()}"

    def text() -> bytes:
        return json.dumps({"owner": owner, "expires": time.time() + lease_seconds}).encode()

    seen: tuple[str, float] | None = None
    seen_since = 0.0

    def acquire() -> bool:
        nonlocal seen, seen_since
        held = _read_lease(backend, path)
        if held is not None:
            if held != seen:
                seen, seen_since = held, time.monotonic()
            if held[1] > time.time() and time.monotonic() < seen_since + lease_seconds:
                return False
            backend.remove(path)
        # The second look settles it where creating is not exclusive and two came at once.
        return backend.create(path, text()) and (_read_lease(backend, path) or ("",))[0] == owner

    def renew() -> None:
        held = _read_lease(backend, path)
        if held is None or held[0] == owner:
            backend.write(path, text())

    _wait_until(acquire, on_wait)
    heartbeat = Heartbeat(renew, lease_seconds / 4)
    try:
        yield
    finally:
        heartbeat.stop()
        held = _read_lease(backend, path)
        if held is not None and held[0] == owner:
            backend.remove(path)


def _read_lease(backend: Backend, path: str) -> tuple[str, float] | None:
    try:
        fields = json.loads(backend.read(path))
        return str(fields["owner"]), float(fields["expires"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return "", 0.0  # not a lease: as good as expired


class Heartbeat:
    """Calls a function at intervals, in a thread, until stopped."""

    def __init__(self, beat: Callable[[], None], interval_seconds: float) -> None:
        self._beat = beat
        self._interval = interval_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="artifacts-heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self._beat()
            except (StoreError, OSError) as error:
                # The store may be back at the next beat; until then what was written lasts a few beats.
                _log.warning("A lease or pin could not be renewed: %s", error)

    def stop(self) -> None:
        """Stops the calls and waits for one that is running."""
        self._stopped.set()
        self._thread.join()
