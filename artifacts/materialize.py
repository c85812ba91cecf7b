"""From an artifact to a local, read-only folder whose every byte has been verified by this process."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from artifacts.backend import LocalBackend
from artifacts.errors import CorruptObjectError, NotFoundError, writing
from artifacts.hashing import OnBytes
from artifacts.locks import file_lock
from artifacts.manifest import FileEntry, Manifest
from artifacts.objects import Objects, in_parallel, object_path
from artifacts.scratch import remove_tree, scratch_folder


class Materializer:
    """Makes folders out of artifacts.

    Args:
        objects: The store's objects.
        local: Objects on this machine: the same for a local store, else a cache that downloads go to.
        root: Where ``materialized/`` and ``tmp/`` lie; on the file system of ``local`` where possible.
    """

    def __init__(self, objects: Objects, local: Objects, root: Path) -> None:
        assert isinstance(local.backend, LocalBackend)
        self._objects = objects
        self._local = local
        self._place = local.backend
        self._root = root

    def run(self, manifest: Manifest, on_bytes: OnBytes | None) -> Path:
        """Returns the folder of an artifact, making or mending it first.

        Args:
            manifest: The artifact.
            on_bytes: Called with numbers of bytes that add up to the size of the artifact.

        Raises:
            CorruptObjectError: If an object is corrupt; it has been removed.
            NotFoundError: If an object is missing.
            StoreWriteError: If the folder cannot be written.
        """
        sizes = {entry.sha256: entry for entry in manifest.files}

        def fetch(entry: FileEntry, stop: threading.Event) -> None:
            self._fetch(manifest, entry, on_bytes, stop)

        in_parallel(fetch, sorted(sizes.values(), key=lambda entry: -entry.size_bytes))
        if on_bytes is not None:
            on_bytes(
                manifest.size_bytes - sum(entry.size_bytes for entry in sizes.values())
            )  # files with equal content
        target = self._root / "materialized" / manifest.digest
        with writing(str(self._root)):
            if not target.is_dir():
                self._build(manifest, target)
            self._mend(manifest, target)
            with suppress(PermissionError):  # another user's; it then counts from when that user made it
                os.utime(target)  # garbage collection goes by the last use
        return target

    def _fetch(self, manifest: Manifest, entry: FileEntry, on_bytes: OnBytes | None, stop: threading.Event) -> None:
        if self._objects is self._local:
            problem = self._local.problem(entry.sha256, entry.size_bytes, full=True, on_bytes=on_bytes, stop=stop)
            if problem is not None:
                self._raise(manifest, entry, problem)
            return
        problem = self._local.problem(entry.sha256, entry.size_bytes, full=True, stop=stop)
        if problem is None:
            if on_bytes is not None:
                on_bytes(entry.size_bytes)
            return
        if problem != "is missing":
            self._local.discard(entry.sha256, problem)
        with scratch_folder(self._place.root) as scratch:
            download = scratch / entry.sha256
            problem = self._objects.download(entry.sha256, download, on_bytes=on_bytes, stop=stop)
            if problem is not None:
                self._raise(manifest, entry, problem)
            with writing(str(self._root)):
                self._local.adopt(download, entry.sha256)

    def _raise(self, manifest: Manifest, entry: FileEntry, problem: str) -> None:
        where = f"Artifact store {self._objects.backend.url}: the object {entry.sha256[:12]} ({entry.path} of {manifest.ref.short})"
        if problem == "is missing":
            raise NotFoundError(f"{where} is missing. Run the step that made it again.")
        self._objects.discard(entry.sha256, problem)
        raise CorruptObjectError(
            f"{where} {problem}. It has been removed; run the step that made it again.",
            digest=entry.sha256,
            artifact=manifest.digest,
        )

    def _build(self, manifest: Manifest, target: Path) -> None:
        with scratch_folder(self._root) as scratch:
            made = scratch / "tree"
            for entry in manifest.files:
                path = made / entry.path
                path.parent.mkdir(parents=True, exist_ok=True)
                self._link(entry, path)
            for place, folders, _ in os.walk(made):
                for name in folders:
                    os.chmod(os.path.join(place, name), 0o555)
            target.parent.mkdir(exist_ok=True)
            try:
                os.rename(made, target)
            except OSError:
                if not target.is_dir():  # otherwise another process was faster, and ours is not needed
                    raise
            else:
                os.chmod(target, 0o555)

    def _link(self, entry: FileEntry, path: Path) -> None:
        source = self._place.path(object_path(entry.sha256))
        for link in (os.link, os.symlink):
            try:
                link(source, path)
            except OSError:
                continue  # another file system, or not allowed for this user: the next way
            return
        shutil.copyfile(source, path)
        os.chmod(path, 0o444)

    def _mend(self, manifest: Manifest, target: Path) -> None:
        """Makes a folder, whoever made or changed it, hold exactly the artifact's verified files."""
        if not any(self._wrong(manifest, target)):
            return
        with file_lock(self._root / "locks" / f"materialized-{manifest.digest}.lock"):
            strays, wrong = self._wrong(manifest, target)
            for path in strays:
                with _writable(path.parent):
                    path.unlink(missing_ok=True)
            for entry in wrong:
                path = target / entry.path
                with _writable_path(target, path):
                    if path.is_dir():
                        remove_tree(path)
                    fresh = path.with_name(f".{os.urandom(8).hex()}")
                    self._link(entry, fresh)
                    os.replace(fresh, path)

    def _wrong(self, manifest: Manifest, target: Path) -> tuple[list[Path], list[FileEntry]]:
        """Returns the files that do not belong into a folder, and the entries whose files are missing or wrong."""
        expected = {target / entry.path for entry in manifest.files}
        found = {Path(place, name) for place, _, names in os.walk(target) for name in names}
        wrong = [entry for entry in manifest.files if not self._is_right(entry, target / entry.path)]
        return sorted(found - expected), wrong

    def _is_right(self, entry: FileEntry, path: Path) -> bool:
        try:
            if os.path.samestat(os.stat(path), os.stat(self._place.path(object_path(entry.sha256)))):
                return True  # the verified object itself
            with open(path, "rb") as stream:  # a copy
                return hashlib.file_digest(stream, "sha256").hexdigest() == entry.sha256
        except OSError:
            return False


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    mode = folder.stat().st_mode
    os.chmod(folder, 0o755)
    try:
        yield
    finally:
        os.chmod(folder, mode)


@contextmanager
def _writable_path(target: Path, path: Path) -> Iterator[None]:
    missing = [parent for parent in path.parents if parent.is_relative_to(target) and not parent.is_dir()]
    nearest = next(parent for parent in path.parents if parent.is_dir())
    with _writable(nearest):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    for folder in missing:
        os.chmod(folder, 0o555)
