"""Notes of what a process has begun elsewhere, so that whoever comes after can end it if the process was killed.

    <root>/notes/<name>.json    what was begun; its writer holds the lock ``note-<name>`` for as long as it lives

A lock that can be had says that the writer is gone: at once in a local folder, when its lease has expired elsewhere. On
file systems without locks a living writer looks dead, so what is done about a note must do a living one no lasting harm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any

from artifacts.backend import Backend
from artifacts.errors import StoreWriteError
from artifacts.locks import LEASE_SECONDS, store_lock

NOTES = "notes"


class Note:
    """A note of a living process; `Store.note` writes one.

    Attributes:
        name: Its name, which no other note has.
    """

    def __init__(self, backend: Backend, fields: Mapping[str, Any], lease_seconds: float = LEASE_SECONDS) -> None:
        self.name = os.urandom(8).hex()
        self._backend = backend
        self._held = ExitStack()
        self._held.enter_context(store_lock(backend, f"note-{self.name}", lease_seconds=lease_seconds))
        try:
            backend.write(f"{NOTES}/{self.name}.json", json.dumps(dict(fields)).encode())
        except BaseException:
            self._held.close()
            raise

    def remove(self) -> None:
        """Takes the note away: all of it is done.

        Raises:
            StoreWriteError: It cannot be removed; then it is as if left.
        """
        with self._held:
            self._backend.remove(f"{NOTES}/{self.name}.json")

    def leave(self) -> None:
        """Leaves the note to whoever comes after."""
        self._held.close()


def left_notes(backend: Backend, wanted: Callable[[Mapping[str, Any]], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields notes whose writers are gone, one holder each; a note is removed when the loop comes back from it.

    Where the store may only be read, there are none: who may write to it finds them.

    Args:
        backend: The store's place.
        wanted: Which notes; the others stay.

    Yields:
        The name and what was noted.
    """
    for entry in list(backend.walk(NOTES)):
        fields = _read(backend, entry.path)
        if fields is None or not wanted(fields):
            continue
        with ExitStack() as held:
            try:
                held.enter_context(_lock_of_the_dead(backend, entry.path))
            except (_HeldError, StoreWriteError):
                continue
            if backend.info(entry.path) is None:
                continue  # somebody else has seen to it meanwhile
            yield entry.path.rpartition("/")[2].removesuffix(".json"), fields
            backend.remove(entry.path)


def forgotten_notes(backend: Backend, before: float) -> list[str]:
    """The paths of notes that nobody has picked up.

    Args:
        backend: The store's place.
        before: Only notes from before this time, in seconds since 1970.
    """
    found = []
    for entry in backend.walk(NOTES):
        if entry.modified <= before:
            with suppress(_HeldError, StoreWriteError), _lock_of_the_dead(backend, entry.path):
                found.append(entry.path)
    return found


def _lock_of_the_dead(backend: Backend, path: str) -> AbstractContextManager[None]:
    name = path.rpartition("/")[2].removesuffix(".json")
    return store_lock(backend, f"note-{name}", on_wait=_give_up)


def _read(backend: Backend, path: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(backend.read(path))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


class _HeldError(Exception):
    """Its writer lives, or somebody else sees to it."""


def _give_up(seconds: float) -> None:
    raise _HeldError
