"""Pins: what a running flow needs, so that garbage collection leaves it alone. They expire when the flow is dead."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from artifacts.backend import Backend
from artifacts.errors import StoreError
from artifacts.locks import Heartbeat
from artifacts.refs import ArtifactRef, check_digest

PIN_SECONDS = 3600.0

_log = logging.getLogger("artifacts")


class Pin:
    """A growing set of artifacts that must stay."""

    def __init__(self, backend: Backend, seconds: float) -> None:
        self._backend = backend
        self._seconds = seconds
        self._path = f"pins/{os.urandom(8).hex()}.json"
        self._digests: set[str] = set()
        self._is_written = False
        self._lock = threading.Lock()

    def add(self, *artifacts: ArtifactRef | str) -> None:
        """Pins more artifacts, given by ref or digest.

        Raises:
            StoreWriteError: If the store cannot be written.
        """
        digests = {item.digest if isinstance(item, ArtifactRef) else check_digest(item) for item in artifacts}
        with self._lock:
            if digests - self._digests:
                self._digests |= digests
                self._write()

    def renew(self) -> None:
        """Sets the expiry anew."""
        with self._lock:
            if self._digests:
                self._write()

    def remove(self) -> None:
        """Lets everything go."""
        with self._lock:
            if self._is_written:
                self._backend.remove(self._path)

    def _write(self) -> None:
        fields = {
            "digests": sorted(self._digests),
            "expires": time.time() + self._seconds,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._backend.write(self._path, json.dumps(fields).encode())
        self._is_written = True


@contextmanager
def pinned(backend: Backend, artifacts: Iterable[ArtifactRef | str], seconds: float = PIN_SECONDS) -> Iterator[Pin]:
    """Pins artifacts while the block runs.

    Args:
        backend: The store's place.
        artifacts: What is needed from the start; `Pin.add` takes more later.
        seconds: How long a pin outlives an owner that died.
    """
    pin = Pin(backend, seconds)
    heartbeat = Heartbeat(pin.renew, seconds / 6)
    try:
        pin.add(*artifacts)
        yield pin
    finally:
        heartbeat.stop()
        try:
            pin.remove()
        except StoreError as error:
            _log.warning("A pin stays until it expires: %s", error)  # no reason to call finished work a failure


def read_pins(backend: Backend) -> tuple[set[str], list[str]]:
    """Returns the digests that are pinned now, and the paths of pins that have expired."""
    digests: set[str] = set()
    expired = []
    for entry in backend.walk("pins"):
        try:
            fields = json.loads(backend.read(entry.path))
            if fields["expires"] > time.time() or _lives(fields):
                digests.update(fields["digests"])
                continue
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # not a pin: as good as expired
        expired.append(entry.path)
    return digests, sorted(expired)


def _lives(fields: Mapping[str, Any]) -> bool:
    """Whether the owner of a pin runs on this machine, whatever the clock says: it jumps when a machine has slept."""
    if fields["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(fields["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True
