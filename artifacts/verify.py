"""Reads every byte of a store and says what is wrong with it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from artifacts.hashing import OnBytes, serialized
from artifacts.manifest import Manifest, manifest_path
from artifacts.objects import in_parallel
from artifacts.sealed import BrokenSealError

if TYPE_CHECKING:
    from artifacts.store import Store


@dataclass(frozen=True)
class Problem:
    """Something wrong in a store.

    Attributes:
        part: ``object``, ``manifest`` or ``record``.
        path: Where, relative to the store's root.
        what: What is wrong.
    """

    part: str
    path: str
    what: str


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` read and found.

    Attributes:
        num_records: Index records.
        num_manifests: Artifacts.
        num_objects: Objects.
        size_bytes: Size of all objects.
        problems: What is wrong; empty if the store is whole.
        removed: Whether what was corrupt has been removed.
    """

    num_records: int
    num_manifests: int
    num_objects: int
    size_bytes: int
    problems: tuple[Problem, ...]
    removed: bool


def verify(store: Store, *, on_bytes: OnBytes | None = None, remove: bool = False) -> VerifyReport:
    """Reads all records, manifests and objects of a store.

    Args:
        store: The store.
        on_bytes: Called, from one thread at a time, with numbers of bytes of objects that were read.
        remove: Whether to remove what is corrupt, so that the steps that made it run again.

    Raises:
        StoreUnavailableError: If the store cannot be read.
    """
    corrupt: list[Problem] = []
    missing: list[Problem] = []
    entries = {entry.path.rpartition("/")[2]: entry for entry in store.backend.walk("objects")}
    on_bytes = serialized(on_bytes)

    def check(digest: str, stop: threading.Event) -> str | None:
        entry = entries[digest]
        return store.objects.problem(digest, entry.size_bytes, full=True, again=True, on_bytes=on_bytes, stop=stop)

    for digest, problem in zip(entries, in_parallel(check, entries), strict=True):
        if problem is not None and problem != "is missing":  # removed while we looked: not our business
            corrupt.append(Problem("object", entries[digest].path, problem))

    digests = sorted(store.digests())
    for digest in digests:
        path = manifest_path(digest)
        try:
            manifest = Manifest.from_bytes(store.backend.read(path), digest)
        except FileNotFoundError:
            continue
        except BrokenSealError as error:
            corrupt.append(Problem("manifest", path, str(error)))
            continue
        for file in manifest.files:
            entry = entries.get(file.sha256)
            if entry is None:
                missing.append(Problem("manifest", path, f"the object of {file.path} ({file.sha256[:12]}) is missing"))

    names = sorted((unit, key) for unit, key, _ in store.index.names())
    for unit, key in names:
        path = store.index.path(unit, key)
        try:
            record = store.index.read(unit, key)
        except BrokenSealError as error:
            corrupt.append(Problem("record", path, str(error)))
            continue
        for name, ref in sorted(record.outputs.items()) if record is not None else ():
            if ref.digest not in digests:
                missing.append(Problem("record", path, f"the artifact {name} ({ref.short}) is missing"))

    if remove:
        for found in corrupt:
            if found.part == "object":
                store.objects.forget(found.path.rpartition("/")[2])
            store.backend.remove(found.path)
    size_bytes = sum(entry.size_bytes for entry in entries.values())
    return VerifyReport(len(names), len(digests), len(entries), size_bytes, (*corrupt, *missing), remove)
