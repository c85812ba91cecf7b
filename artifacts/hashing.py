"""Hashing while streaming: one pass over the bytes, big buffers, several files at a time.

``hashlib`` and file reads release the interpreter lock for large buffers, so threads are enough.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from typing import Protocol

BUFFER_BYTES = 4 << 20
NUM_WORKERS = max(2, min(8, os.cpu_count() or 1))

OnBytes = Callable[[int], object]


class Readable(Protocol):
    """What hashing needs of a stream; raw and buffered files and fsspec's have it."""

    def readinto(self, buffer: bytearray, /) -> int | None:
        """Fills the buffer from its start and returns the number of bytes; 0 at the end."""


class Writable(Protocol):
    """Where bytes go while they are hashed."""

    def write(self, data: memoryview, /) -> int:
        """Writes all of the data."""


class StoppedError(Exception):
    """Another file of the same work failed, so this one was given up."""


def hash_stream(
    stream: Readable,
    *,
    sink: Writable | None = None,
    on_bytes: OnBytes | None = None,
    stop: threading.Event | None = None,
) -> tuple[str, int]:
    """Reads a stream to its end.

    Args:
        stream: The bytes.
        sink: Where to write them at the same time.
        on_bytes: Called with the number of bytes of each piece.
        stop: Checked before each piece.

    Returns:
        The sha256 as 64 hexadecimal digits, and the number of bytes.

    Raises:
        StoppedError: If ``stop`` was set.
    """
    hasher = hashlib.sha256()
    buffer = bytearray(BUFFER_BYTES)
    view = memoryview(buffer)
    size_bytes = 0
    while True:
        if stop is not None and stop.is_set():
            raise StoppedError
        count = stream.readinto(buffer)
        if not count:
            return hasher.hexdigest(), size_bytes
        hasher.update(view[:count])
        if sink is not None:
            sink.write(view[:count])
        size_bytes += count
        if on_bytes is not None:
            on_bytes(count)


def serialized(on_bytes: OnBytes | None) -> OnBytes | None:
    """Wraps a progress callback so that worker threads call it one at a time."""
    if on_bytes is None:
        return None
    lock = threading.Lock()

    def call(count: int) -> None:
        with lock:
            on_bytes(count)

    return call
