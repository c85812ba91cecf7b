"""Garbage collection: removes what no index record needs, nothing that is young, and nothing that is pinned.

    record      dropped by the policy (age, number per step), unless it names a pinned artifact
    manifest    removed if no kept record names it, it is not pinned, and it is older than the grace time
    object      removed if no kept manifest lists it and it is older than the grace time
    tmp         removed if its owner is dead
    work        what interrupted runs would pick up again: removed after a week without a change
    notes       of what killed runs had begun elsewhere: removed after a week
    folders     materialised folders and cached downloads: removed if their artifact is gone and they have not
                been asked for within the grace time

The order of removal is the reverse of publishing, so that a collection that is killed leaves a whole store.
In a local store, publishing and collecting exclude each other. In a remote one they do not: there the grace
time protects what is being published, and a publisher looks again, after writing its manifest, for objects
that it found in the store.

Runs and collections need no lock between them: a run pins what a record names and then looks whether the record is
still there; a collection drops records and then reads the pins.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from artifacts.backend import Entry, LocalBackend
from artifacts.errors import writing
from artifacts.index import IndexRecord
from artifacts.locks import file_lock, remove_if_free
from artifacts.manifest import Manifest
from artifacts.notes import forgotten_notes
from artifacts.pins import read_pins
from artifacts.scratch import last_change, remove_tree, stale_scratch, tree_size
from artifacts.sealed import BrokenSealError
from artifacts.store import Store

_DAY_SECONDS = 86400.0
_RESUMABLE_SECONDS = 7 * _DAY_SECONDS


@dataclass
class GcReport:
    """What a collection removed, or would remove.

    Attributes:
        dry_run: Whether nothing was removed.
        records: Paths of dropped index records.
        manifests: Paths of removed manifests.
        objects: Paths of removed objects.
        scratch: Names of folders of dead owners.
        abandoned: Keys whose interrupted work nobody has picked up.
        materialized: Digests of removed folders.
        cached: Digests of downloads removed from this machine.
        leftovers: Expired pins and leases, unused lock files, unfinished uploads, notes that nobody has picked up.
        freed_bytes: Size of all these.
        kept_records: Number of records that stay.
        kept_manifests: Number of artifacts that stay.
        kept_bytes: Size of the objects that stay.
    """

    dry_run: bool
    records: list[str] = field(default_factory=list)
    manifests: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    scratch: list[str] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)
    materialized: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    freed_bytes: int = 0
    kept_records: int = 0
    kept_manifests: int = 0
    kept_bytes: int = 0


def collect(
    store: Store,
    *,
    dry_run: bool,
    older_than_days: float | None = None,
    keep_last: int | None = None,
    grace_seconds: float = _DAY_SECONDS,
) -> GcReport:
    """Collects garbage.

    Args:
        store: The store.
        dry_run: Whether to remove nothing and only report.
        older_than_days: Drop index records older than this; None for no limit of age.
        keep_last: Drop all but the newest so many records of each step; None for no limit of number. With both
            limits, a record is dropped only if both say so; with neither, none is.
        grace_seconds: What was written (or, for folders, asked for) within this time stays.

    Returns:
        What was removed; of a dry run, what would be.

    Raises:
        StoreWriteError: If something cannot be removed.
        ValueError: If a limit is negative.
    """
    for name, value in (
        ("older_than_days", older_than_days),
        ("keep_last", keep_last),
        ("grace_seconds", grace_seconds),
    ):
        if value is not None and value < 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more.")
    with ExitStack() as stack:
        if isinstance(store.backend, LocalBackend) and not dry_run:
            stack.enter_context(file_lock(store.backend.root / "locks" / "gc.lock"))
        return _Collection(store, dry_run, grace_seconds).run(older_than_days, keep_last)


class _Collection:
    def __init__(self, store: Store, dry_run: bool, grace_seconds: float) -> None:
        self._store = store
        self._dry_run = dry_run
        self._grace_seconds = grace_seconds
        self._young_after = time.time() - grace_seconds
        self._report = GcReport(dry_run)

    def run(self, older_than_days: float | None, keep_last: int | None) -> GcReport:
        pinned, _ = read_pins(self._store.backend)
        live = self._collect_records(pinned, older_than_days, keep_last)
        # Again: a flow that found a record pins what it names and then looks whether the record is still there. So
        # either its pin is read here, or it finds the record gone and makes everything anew.
        pinned, expired = read_pins(self._store.backend)
        manifests = self._collect_manifests(live | pinned)
        self._collect_objects(manifests)
        self._collect_local(manifests)
        self._remove_stored(expired, self._report.leftovers)
        self._collect_leftovers()
        return self._report

    def _collect_records(self, pinned: set[str], older_than_days: float | None, keep_last: int | None) -> set[str]:
        """Drops records by the policy and returns the digests that the others name."""
        index = self._store.index
        by_unit: dict[str, list[IndexRecord]] = {}
        dropped = []
        for unit, key, _ in index.names():
            try:
                record = index.read(unit, key)
            except BrokenSealError:
                dropped.append(index.path(unit, key))
                continue
            if record is not None:
                by_unit.setdefault(unit, []).append(record)
        live: set[str] = set()
        for records in by_unit.values():
            records.sort(key=lambda record: record.created, reverse=True)
            for rank, record in enumerate(records):
                verdicts = []
                if older_than_days is not None:
                    verdicts.append(record.created_seconds < time.time() - older_than_days * _DAY_SECONDS)
                if keep_last is not None:
                    verdicts.append(rank >= keep_last)
                digests = {ref.digest for ref in record.outputs.values()}
                if verdicts and all(verdicts) and not digests & pinned:
                    dropped.append(index.path(record.unit, record.key))
                else:
                    live |= digests
                    self._report.kept_records += 1
        self._remove_stored(dropped, self._report.records)
        return live

    def _collect_manifests(self, live: set[str]) -> dict[str, Manifest]:
        """Removes manifests that nothing needs and returns the others."""
        backend = self._store.backend
        kept = {}
        dropped = []
        for entry in backend.walk("manifests"):
            digest = entry.path.rpartition("/")[2].removesuffix(".json")
            try:
                manifest = Manifest.from_bytes(backend.read(entry.path), digest)
            except FileNotFoundError:
                continue
            except BrokenSealError:
                dropped.append(entry.path)  # nothing can be made of it any more
                continue
            if digest in live or self._is_young(entry):
                kept[digest] = manifest
            else:
                dropped.append(entry.path)
        self._report.kept_manifests = len(kept)
        self._remove_stored(dropped, self._report.manifests)
        return kept

    def _is_young(self, entry: Entry) -> bool:
        if entry.modified > self._young_after:
            return True
        # A remote store may be published to meanwhile, and a listing may be minutes old.
        again = None if self._store.backend.is_local else self._store.backend.info(entry.path)
        return again is not None and again.modified > self._young_after

    def _collect_objects(self, manifests: dict[str, Manifest]) -> None:
        needed = {entry.sha256 for manifest in manifests.values() for entry in manifest.files}
        dropped = []
        for entry in self._store.backend.walk("objects"):
            digest = entry.path.rpartition("/")[2]
            if digest in needed or self._is_young(entry):
                self._report.kept_bytes += entry.size_bytes
            else:
                dropped.append(entry.path)
                self._report.freed_bytes += entry.size_bytes
                if not self._dry_run:
                    self._store.objects.forget(digest)
        self._remove_stored(dropped, self._report.objects)

    def _collect_local(self, manifests: dict[str, Manifest]) -> None:
        """Removes what lies on this machine: folders, downloads, and what dead processes left."""
        work_dir = self._store.work_dir
        for path, size_bytes in stale_scratch(work_dir, self._grace_seconds):
            self._remove_local(path, self._report.scratch, size_bytes)
        long_ago = time.time() - max(_RESUMABLE_SECONDS, self._grace_seconds)
        for path in sorted((work_dir / "work").glob("*")):
            if last_change(path) <= long_ago:
                self._remove_local(path, self._report.abandoned, tree_size(path))
        for path in sorted((work_dir / "materialized").glob("*")):
            if path.name not in manifests and _modified(path) <= self._young_after:
                self._remove_local(path, self._report.materialized, 0)  # links; their objects are counted
        if self._store.local_objects is not self._store.objects:
            needed = {entry.sha256 for manifest in manifests.values() for entry in manifest.files}
            for entry in self._store.local_objects.backend.walk("objects"):
                digest = entry.path.rpartition("/")[2]
                if digest not in needed and entry.modified <= self._young_after:
                    self._remove_local(work_dir / entry.path, self._report.cached, entry.size_bytes)
                    if not self._dry_run:
                        self._store.local_objects.forget(digest)

    def _collect_leftovers(self) -> None:
        backend = self._store.backend
        long_ago = time.time() - max(_RESUMABLE_SECONDS, self._grace_seconds)
        self._remove_stored(forgotten_notes(backend, long_ago), self._report.leftovers)
        if isinstance(backend, LocalBackend):
            for path in sorted((backend.root / "locks").glob("*.lock")):
                is_old = _modified(path) <= self._young_after
                if is_old and path.name != "gc.lock" and remove_if_free(path, dry_run=self._dry_run):
                    self._report.leftovers.append(f"locks/{path.name}")
            return
        old = [
            entry
            for folder in ("tmp", "leases")
            for entry in backend.walk(folder)
            if entry.modified <= self._young_after
        ]
        self._report.freed_bytes += sum(entry.size_bytes for entry in old)
        self._remove_stored([entry.path for entry in old], self._report.leftovers)

    def _remove_stored(self, paths: Iterable[str], reported: list[str]) -> None:
        for path in sorted(paths):
            reported.append(path)
            if not self._dry_run:
                self._store.backend.remove(path)

    def _remove_local(self, path: Path, reported: list[str], size_bytes: int) -> None:
        reported.append(path.name)
        self._report.freed_bytes += size_bytes
        if not self._dry_run:
            with writing(str(path)):
                remove_tree(path)


def _modified(path: Path) -> float:
    """When a file or folder was last changed; just now, if somebody has removed it meanwhile."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()
