"""The content-addressed store: artifacts by the hash of their content, and an index from step keys to them.

    <root>/objects/ab/<sha256>            files, by the hash of their bytes, read-only
    <root>/manifests/ab/<digest>.json     artifacts: lists of files, by the hash of that list
    <root>/index/<unit>/<key>.json        which key of which step gave which artifacts
    <root>/materialized/<digest>/         artifacts as folders of hard links (local stores; else in the cache)
    <root>/cache/stamps/                  state in which each object was last found good (else in the cache)
    <root>/work/<key>/                    what an interrupted run picks up again (else in the cache)
    <root>/notes/<name>.json              what a killed run has begun elsewhere, such as a run in a log of experiments
    <root>/tmp, locks, leases, pins       work in progress

Publishing writes objects, then the manifest; `Store.record` writes the index record last. Each write is atomic,
so whatever is visible is complete, and a process killed at any point leaves at most garbage, which
``artifacts.gc`` removes. Reading verifies; what is corrupt is removed, so that the step that made it runs again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.backend import Backend, LocalBackend, open_backend
from artifacts.errors import CorruptObjectError, NotFoundError, StoreWriteError, writing
from artifacts.hashing import OnBytes, serialized
from artifacts.index import Index, IndexRecord, now
from artifacts.locks import LEASE_SECONDS, OnWait, file_lock, store_lock
from artifacts.manifest import Manifest, manifest_path
from artifacts.materialize import Materializer
from artifacts.notes import Note, left_notes
from artifacts.objects import Objects, in_parallel, object_path
from artifacts.pins import PIN_SECONDS, Pin, pinned
from artifacts.publishing import Ingest, empty_folder, scan
from artifacts.refs import ArtifactRef, check_digest, check_name
from artifacts.scratch import remove_tree, scratch_folder
from artifacts.sealed import BrokenSealError
from artifacts.verify import VerifyReport, verify

_log = logging.getLogger("artifacts")


@dataclass(frozen=True)
class Lookup:
    """What the index knows of a key.

    Attributes:
        record: The record, if all of its artifacts are there and whole; None is a miss.
        problems: What was missing or corrupt (and removed), if there was a record; one line each.
    """

    record: IndexRecord | None
    problems: tuple[str, ...] = ()


class Store:
    """An artifact store. Open one with `Store.open`; it may be used from several threads and processes at once.

    Attributes:
        url: Its address.
        backend: Where its bytes lie.
        objects: Its objects.
        local_objects: Its objects on this machine: the same for a local store, else a cache.
        index: Its index.
        work_dir: Local folder with ``materialized/`` and ``tmp/``: the root of a local store, else the cache.
    """

    def __init__(self, backend: Backend, *, work_dir: Path, stamps_dir: Path) -> None:
        self.url = backend.url
        self.backend = backend
        self.work_dir = work_dir
        self.index = Index(backend)
        self.objects = Objects(backend, stamps_dir / "store")
        self.local_objects = self.objects if backend.is_local else Objects(LocalBackend(work_dir), stamps_dir / "local")
        self._materializer = Materializer(self.objects, self.local_objects, work_dir)

    @classmethod
    def open(cls, url: str, *, cache_dir: Path | None = None, **options: Any) -> Store:
        """Opens a store. Nothing is written, and nothing is read, until it is used.

        Args:
            url: A path, or any fsspec address: ``file:``, ``memory://name``, ``s3://bucket/prefix``, ``gs://…``.
            cache_dir: Local folder for downloads and stamps. By default: inside a local store that can be
                written, a temporary folder for ``memory:``, else a folder below ``~/.cache``.
            **options: Passed to the fsspec file system.

        Raises:
            StoreUnavailableError: If the address is not one, or its driver is not installed.
        """
        backend = open_backend(url, **options)
        if isinstance(backend, LocalBackend) and _may_write(backend.root):
            work_dir = backend.root
            stamps_dir = (cache_dir or backend.root / "cache") / "stamps"
            return cls(backend, work_dir=work_dir, stamps_dir=stamps_dir)
        if cache_dir is None and backend.url.startswith("memory:"):
            work_dir = Path(tempfile.mkdtemp(prefix="artifacts-"))
            store = cls(backend, work_dir=work_dir, stamps_dir=work_dir / "stamps")
            weakref.finalize(store, remove_tree, work_dir)
            return store
        work_dir = (cache_dir or _user_cache(backend.url)).absolute()
        return cls(backend, work_dir=work_dir, stamps_dir=work_dir / "stamps")

    def staging(self) -> AbstractContextManager[Path]:
        """Gives an empty local folder to build an artifact in, removed when the block ends.

        For a local store it lies in the store, so that publishing with ``consume=True`` moves the files.
        """
        return scratch_folder(self.work_dir)

    def resumable(self, key: str) -> Path:
        """Returns the local folder for what an interrupted run of a key picks up again, made if need be.

        Whoever finishes the work removes it; garbage collection does when it has not been written to for a week.
        """
        path = self.work_dir / "work" / check_name(key, "key")
        with writing(str(path)):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def has_resumable(self, key: str) -> bool:
        """Whether an interrupted run of a key has left something."""
        return (self.work_dir / "work" / check_name(key, "key")).is_dir()

    def publish(
        self,
        directory: Path,
        *,
        kind: str,
        metadata: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        consume: bool,
        on_bytes: OnBytes | None = None,
    ) -> ArtifactRef:
        """Stores a folder as an artifact.

        Args:
            directory: The folder; all regular files below it, none of which may be open for writing.
            kind: What it is: ``checkpoint``, ``adapter``, ``dataset``, …
            metadata: Small JSON data that belongs to the content.
            provenance: Small JSON data about its making (producer, inputs, versions); not part of its digest.
                If the same content was published before, the earlier provenance stays.
            consume: Whether the folder's files may be moved away; the folder is left empty.
            on_bytes: Called, from one thread at a time, with numbers of bytes that add up to the artifact's size.

        Returns:
            The ref of the artifact.

        Raises:
            InvalidArtifactError: If the folder is empty, or holds links or special files.
            StoreWriteError: If the store cannot be written; nothing incomplete becomes visible.
            UnhashableError: If metadata or provenance is not plain JSON.
        """
        files = scan(directory)
        check_name(kind, "kind of artifact")
        with self._no_collection(), self._publishing_scratch(consume) as scratch:
            ingest = Ingest(self.objects, scratch, consume=consume, on_bytes=serialized(on_bytes))
            entries = ingest.run(files)
            manifest = Manifest.build(kind, entries, metadata or {}, {"created": now(), **(provenance or {})})
            self._write_manifest(manifest)
            ingest.restore_reused()
        if consume:
            empty_folder(directory)
        return manifest.ref

    def _publishing_scratch(self, consume: bool) -> AbstractContextManager[Path]:
        if self.backend.is_local:
            return scratch_folder(self.work_dir)
        return nullcontext(self.work_dir)  # unused: files are uploaded from where they are

    def _no_collection(self) -> AbstractContextManager[None]:
        # Otherwise an old object could be collected between being found here and being listed in the manifest.
        if isinstance(self.backend, LocalBackend):
            return file_lock(self.backend.root / "locks" / "gc.lock", shared=True)
        return nullcontext()

    def _write_manifest(self, manifest: Manifest) -> None:
        path = manifest_path(manifest.digest)
        data = manifest.to_bytes()
        try:
            earlier = self.backend.read(path)
            Manifest.from_bytes(earlier, manifest.digest)
            data = earlier  # written again, so that its date is new for garbage collection
        except (FileNotFoundError, BrokenSealError):
            pass
        self.backend.write(path, data)

    def record(
        self,
        unit: str,
        key: str,
        document: Mapping[str, Any],
        outputs: Mapping[str, ArtifactRef],
        info: Mapping[str, Any] | None = None,
    ) -> IndexRecord:
        """Writes down that a key of a step gave these artifacts. The last act of a step.

        Args:
            unit: The step.
            key: Its key, from `artifacts.keys.step_key`.
            document: The key document.
            outputs: The published artifacts, by the names that the step gives them.
            info: Small JSON data about the run.

        Raises:
            NotFoundError: If an artifact is not in this store.
            UnhashableError: If document or info is not plain JSON.
            StoreWriteError: If the store cannot be written.
        """
        for name, ref in outputs.items():
            check_name(name, "output")
            if self.backend.info(manifest_path(ref.digest)) is None:
                raise NotFoundError(
                    f"Artifact store {self.url}: {ref.short} is not there. Publish it before it is recorded."
                )
        record = IndexRecord(unit, key, dict(document), dict(outputs), dict(info or {}), now())
        self.index.write(record)
        return record

    def lookup(self, unit: str, key: str, *, full: bool = False) -> IndexRecord | None:
        """Returns the record of a key if all that it names is there and whole, else None.

        As `check`; the problems go to the ``artifacts`` logger.
        """
        return self.check(unit, key, full=full).record

    def check(self, unit: str, key: str, *, full: bool = False) -> Lookup:
        """Looks a key up and verifies what it names. What is corrupt is removed, and the key is then a miss.

        Args:
            unit: The step.
            key: Its key.
            full: Whether every byte of every artifact must have been read by this process. Otherwise sizes and
                stamps are compared, and an object is read only if its stamp has changed.

        Raises:
            StoreUnavailableError: If the store cannot be read.
        """
        try:
            record = self.index.read(unit, key)
        except BrokenSealError as error:
            problem = f"the index record of {unit} {key[:12]} was corrupt: {error}"
            _log.warning("Artifact store %s: %s. It was removed.", self.url, problem)
            self._remove(self.index.path(unit, key))
            return Lookup(None, (problem,))
        if record is None:
            return Lookup(None)
        problems = []
        for name, ref in sorted(record.outputs.items()):
            problems += [f"{name} ({ref.short}): {problem}" for problem in self._artifact_problems(ref, full=full)]
        return Lookup(None if problems else record, tuple(problems))

    def is_recorded(self, unit: str, key: str) -> bool:
        """Whether there is a record of a key, whatever has become of what it names.

        To ask again after `pin`: garbage collection drops records before it reads the pins for the last time, so what a
        record names that is still there now cannot be collected any more.
        """
        return self.backend.info(self.index.path(unit, key)) is not None

    def _artifact_problems(self, ref: ArtifactRef, *, full: bool) -> list[str]:
        try:
            manifest = self.manifest(ref)
        except (NotFoundError, CorruptObjectError) as error:
            return [str(error)]
        if manifest.ref != ref:
            return ["the index record and the manifest differ in kind or size"]

        def check(digest: str, stop: threading.Event) -> str | None:
            problem = self.objects.problem(digest, sizes[digest].size_bytes, full=full, stop=stop)
            if problem not in (None, "is missing"):
                self.objects.discard(digest, problem)
            return problem

        sizes = {entry.sha256: entry for entry in manifest.files}
        found = zip(sizes.values(), in_parallel(check, sizes), strict=True)
        return [f"the object {entry.sha256[:12]} ({entry.path}) {problem}" for entry, problem in found if problem]

    def records(self, unit: str, *, limit: int | None = 20) -> list[IndexRecord]:
        """Returns the latest records of a step, newest first, unverified: their documents explain misses."""
        return self.index.records(unit, limit=limit)

    def manifest(self, ref: ArtifactRef | str) -> Manifest:
        """Returns the manifest of an artifact, given by ref or digest.

        Raises:
            NotFoundError: If the artifact is not in this store.
            CorruptObjectError: If the manifest is corrupt; it has been removed.
        """
        digest = ref.digest if isinstance(ref, ArtifactRef) else check_digest(ref)
        shown = ref.short if isinstance(ref, ArtifactRef) else digest[:12]
        try:
            return Manifest.from_bytes(self.backend.read(manifest_path(digest)), digest)
        except FileNotFoundError:
            raise NotFoundError(
                f"Artifact store {self.url}: there is no artifact {shown}. Run the step that makes it, or check the address."
            ) from None
        except BrokenSealError as error:
            self._remove(manifest_path(digest))
            raise CorruptObjectError(
                f"Artifact store {self.url}: the manifest of {shown} was corrupt: {error}. "
                "It has been removed; run the step that made the artifact again.",
                digest=digest,
                artifact=digest,
            ) from error

    def materialize(self, ref: ArtifactRef | str, *, on_bytes: OnBytes | None = None) -> Path:
        """Returns a local, read-only folder with the files of an artifact. Never write into it.

        Each object is read and verified once per process. The folder stays until garbage collection finds that it
        has not been asked for lately (see `pin`).

        Args:
            ref: The artifact, by ref or digest.
            on_bytes: Called, from one thread at a time, with numbers of bytes that add up to the artifact's size.

        Raises:
            NotFoundError: If the artifact, or a part of it, is not in this store.
            CorruptObjectError: If a part of it is corrupt; that part has been removed.
            StoreWriteError: If there is no room for the folder.
        """
        return self._materializer.run(self.manifest(ref), serialized(on_bytes))

    def read_text(self, ref: ArtifactRef | str, path: str) -> str:
        """Returns a small UTF-8 file of an artifact, verified, without making the folder.

        Raises:
            NotFoundError: If the artifact or the file is not there.
            CorruptObjectError: If the file is corrupt; it has been removed.
        """
        manifest = self.manifest(ref)
        entry = manifest.file(path)
        try:
            data = self.backend.read(object_path(entry.sha256))
        except FileNotFoundError:
            raise NotFoundError(
                f"Artifact store {self.url}: {path} of {manifest.ref.short} is missing. Run the step that made it again."
            ) from None
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            self.objects.discard(entry.sha256, "holds other bytes")
            raise CorruptObjectError(
                f"Artifact store {self.url}: {path} of {manifest.ref.short} was corrupt. "
                "It has been removed; run the step that made it again.",
                digest=entry.sha256,
                artifact=manifest.digest,
            )
        return data.decode()

    def verify(self, *, on_bytes: OnBytes | None = None, remove: bool = False) -> VerifyReport:
        """Reads every byte of the store and reports what is wrong; see `artifacts.verify.verify`."""
        return verify(self, on_bytes=on_bytes, remove=remove)

    def digests(self) -> Iterator[str]:
        """Yields the digests of all artifacts, in no particular order."""
        for entry in self.backend.walk("manifests"):
            if entry.path.endswith(".json"):
                yield entry.path.rpartition("/")[2].removesuffix(".json")

    def lock(
        self, unit: str, key: str, *, on_wait: OnWait | None = None, lease_seconds: float = LEASE_SECONDS
    ) -> AbstractContextManager[None]:
        """Holds the lock of a key, so that two processes do not do the same work.

        Look the key up again once it is held: whoever held it before may have finished the work.

        Args:
            unit: The step.
            key: Its key.
            on_wait: Called again and again with the seconds waited so far; an exception from it ends the wait.
            lease_seconds: How long the lock outlives a holder that died. Locks of local stores end at once.
        """
        name = f"{check_name(unit, 'step')}-{check_name(key, 'key')}"
        return store_lock(self.backend, name, on_wait=on_wait, lease_seconds=lease_seconds)

    def pin(
        self, artifacts: Iterable[ArtifactRef | str] = (), *, seconds: float = PIN_SECONDS
    ) -> AbstractContextManager[Pin]:
        """Keeps artifacts from garbage collection while the block runs; ``pin.add(ref)`` adds more.

        Args:
            artifacts: What is needed from the start.
            seconds: How long the pin outlives an owner that died.
        """
        return pinned(self.backend, artifacts, seconds)

    def note(self, fields: Mapping[str, Any]) -> Note:
        """Notes what this process begins elsewhere, for whoever comes after if it is killed.

        Args:
            fields: Small JSON data.

        Returns:
            The note, to be removed when all is done.

        Raises:
            StoreWriteError: If the store cannot be written.
        """
        return Note(self.backend, fields)

    def left_notes(self, wanted: Callable[[Mapping[str, Any]], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Notes whose writers are gone, each removed when the loop comes back from it; see `artifacts.notes`.

        Args:
            wanted: Which of them; the others stay.

        Yields:
            The name and what was noted.

        Raises:
            StoreUnavailableError: If the store cannot be read.
        """
        return left_notes(self.backend, wanted)

    def _remove(self, path: str) -> None:
        try:
            self.backend.remove(path)
        except StoreWriteError as error:
            _log.warning("It could not be removed: %s", error)


def _may_write(root: Path) -> bool:
    existing = next(path for path in (root, *root.parents) if path.exists())
    # A folder that is still to be made below one that cannot be written fails at the first write, with its reason.
    return existing != root or os.access(root, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _user_cache(url: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "vision-finetune" / "artifacts" / hashlib.sha256(url.encode()).hexdigest()[:16]
