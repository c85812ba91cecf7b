"""Content identity of a source, quick enough for `--plan`: what has not changed since it was last hashed is not read again.

The rule, so that a digest is never stale:

* A folder counts with every file beneath it, by relative name and content; a link to a folder beneath it by where it leads.
  What links lead to outside of it counts where it may be read: data files always, the rest with ``follow_links``.
* A file, or the files of a glob, count by name and content; so do the images that their rows may name: every string in them that
  ends like an image (``.png``, ``.jpg``, …) and leads to a place beneath the file's folder, also while no such file exists.
  Preparation reads images by path under the same two conditions only.
* A Hub dataset counts by its commit; an archive or other chained address by the content of its container.
* The built-in dataset counts by its version and those of Pillow and of the fonts.
* Remote addresses inside rows (``allow_urls``) count by name only: nobody can tell whether the other side changed.

Light imports only; pyarrow comes in when a changed parquet or Arrow file must be searched for image names.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlm.config.data import SourceConfig
from vlm.data.locations import (
    IMAGE_SUFFIXES,
    DataFile,
    Location,
    format_of_name,
    is_local,
    leads_outside,
    open_exactly,
    relative_name,
    resolve,
)
from vlm.data.stat_cache import Stamp, StatCache, local_stamp, remote_stamp
from vlm.errors import DataError
from vlm.hub import network_errors

BUILTIN_VERSION = 1
_CHUNK_BYTES = 1 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")


def source_digest(
    source: SourceConfig,
    *,
    follow_links: bool = False,
    cache_dir: Path | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> str:
    """SHA-256 that changes when the content of a source does.

    Args:
        source: The source; only where it lies and its format matter, not its split or row limit.
        follow_links: Whether symbolic links to images may leave the source's folder.
        cache_dir: Folder that remembers hashes between runs; None hashes everything anew.
        on_bytes: Called with the number of bytes just hashed, for a progress bar.

    Returns:
        64 hexadecimal digits.

    Raises:
        DataError: If the source is missing or cannot be read.
    """
    with StatCache(cache_dir) as cache:
        return _digest(_identity(source, _Hasher(cache, on_bytes, follow_links)))


def _identity(source: SourceConfig, hasher: _Hasher) -> dict[str, Any]:
    if "::" in source.path:
        inner, _, outer = source.path.rpartition("::")
        fs, path = open_exactly(outer)
        if not fs.isfile(path):
            raise DataError(f"data source {source.path!r}: its container {outer!r} does not exist. Check data.sources.")
        return {"format": source.format, "inner": inner, "container": hasher.content(fs, path)}
    if source.path.lower().endswith(".zip") and source.format not in ("hub", "builtin"):
        return _identity(source.model_copy(update={"path": f"zip://::{source.path}"}), hasher)
    location = resolve(source)
    if location.format == "builtin":
        versions = {name: version(name) for name in ("pillow", "matplotlib")}
        return {"format": "builtin", "version": BUILTIN_VERSION, **versions}
    if location.format == "hub":
        return {"format": "hub", "name": source.path, "subset": source.subset, "commit": _hub_commit(source)}
    if location.is_folder:
        files = sorted(hasher.tree(location.fs, location.root))
    else:
        files = sorted({entry for file in location.files for entry in _file_entries(location, file, hasher)})
    return {"format": location.format, "files": files}


def _file_entries(location: Location, file: DataFile, hasher: _Hasher) -> Iterator[tuple[str, str]]:
    content = hasher.content(location.fs, file.path)
    yield file.name, content
    folder = posixpath.dirname(file.path)
    for name in hasher.image_names(location.fs, file, content):
        path = posixpath.normpath(posixpath.join(folder, name))
        if path.startswith(folder.rstrip("/") + "/"):
            yield f"{file.name} -> {name}", hasher.content_or_missing(location.fs, path, folder)


def _digest(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _hub_commit(source: SourceConfig) -> str:
    """Commit that a revision stands for now; a full commit needs no network."""
    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return source.revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        commit = HfApi().dataset_info(source.path, revision=source.revision, timeout=20).sha
    except network_errors(HfHubHTTPError, HFValidationError, OSError) as error:
        raise DataError(
            f"the Hub dataset {source.path!r} at revision {source.revision!r} cannot be looked up: {error}. "
            "Check its name and your network, or set revision to a full commit, which needs no look-up."
        ) from error
    assert commit is not None
    return str(commit)


class _Hasher:
    """Hashes files through the cache."""

    def __init__(self, cache: StatCache, on_bytes: Callable[[int], None] | None, follow_links: bool) -> None:
        self._cache = cache
        self._on_bytes = on_bytes
        self.follow_links = follow_links

    def content(self, fs: Any, path: str) -> str:
        """SHA-256 of one file's bytes."""
        if is_local(fs):
            return self._cached(path, local_stamp(os.stat(path)), partial(open, path, "rb"))
        key = f"{'/'.join([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)}://{path}"
        return self._cached(key, remote_stamp(fs.info(path)), lambda: fs.open(path, "rb"))

    def content_or_missing(self, fs: Any, path: str, root: str) -> str:
        """The same for a name that rows give, or a word for a file that is not there or cannot be read from there."""
        try:
            if is_local(fs):
                if not self.follow_links and leads_outside(path, root):
                    return "outside"
                if not os.path.isfile(path):
                    return "missing"  # also a pipe, which would never end
            return self.content(fs, path)
        except (OSError, KeyError, ValueError):
            return "missing"

    def tree(self, fs: Any, root: str) -> Iterator[tuple[str, str]]:
        """(relative name, SHA-256) of every file beneath a folder."""
        if is_local(fs):
            for path, stat in _walk(root, root, self.follow_links, set()):
                name = relative_name(path, root)
                if stat is None:
                    yield name, f"link to {relative_name(os.path.realpath(path), os.path.realpath(root))}"
                else:
                    yield name, self._cached(path, local_stamp(stat), partial(open, path, "rb"))
        else:
            for path in fs.find(root, detail=False):
                yield relative_name(str(path), root), self.content(fs, str(path))

    def image_names(self, fs: Any, file: DataFile, content: str) -> list[str]:
        """Image paths that a file's rows name. They follow from its content, so they are remembered under its hash."""
        key = f"images of {content} as {file.format}"
        known = self._cache.text(key)
        if known is None:
            from vlm.data.readers import read_rows

            names = {name for row in read_rows(fs, file.path, file.format) for name in _image_names(row)}
            known = json.dumps(sorted(names))
            self._cache.remember_text(key, known)
        return list(json.loads(known))

    def _cached(self, key: str, stamp: Stamp | None, opener: Callable[[], Any]) -> str:
        key = key.encode("utf-8", "backslashreplace").decode()  # names on a disk need not be UTF-8, in SQLite they must
        known = self._cache.digest(key, stamp)
        if known is not None:
            return known
        digest = hashlib.sha256()
        with opener() as handle:
            while chunk := handle.read(_CHUNK_BYTES):
                digest.update(chunk)
                if self._on_bytes is not None:
                    self._on_bytes(len(chunk))
        self._cache.remember_digest(key, stamp, digest.hexdigest())
        return digest.hexdigest()


def _walk(folder: str, root: str, follow_links: bool, seen: set[str]) -> Iterator[tuple[str, os.stat_result | None]]:
    """Files beneath a folder; links to folders beneath it come without a stat, since what they lead to comes anyway.

    Links that lead up or across would otherwise be walked for ever, or twice as long with every further one.
    """
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda found: found.name):
            outside = entry.is_symlink() and leads_outside(entry.path, root)
            if entry.is_dir():
                if not entry.is_symlink():
                    yield from _walk(entry.path, root, follow_links, seen)
                elif not outside:
                    yield entry.path, None
                elif follow_links and (real := os.path.realpath(entry.path)) not in seen:
                    seen.add(real)
                    yield from _walk(entry.path, root, follow_links, seen)
            elif entry.is_file() and (not outside or follow_links or format_of_name(entry.name) is not None):
                yield entry.path, entry.stat()


def _image_names(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value.startswith(("[", "{")):
            try:
                yield from _image_names(json.loads(value))
            except (ValueError, RecursionError):
                return
        elif (
            len(value) < 4096
            and posixpath.splitext(value.lower())[1] in IMAGE_SUFFIXES
            and "://" not in value.removeprefix("file://")
        ):
            yield value.removeprefix("file://")
    elif isinstance(value, dict):
        if value.get("bytes"):
            # An embedded image's path is only its former name.
            return
        for item in value.values():
            yield from _image_names(item)
    elif isinstance(value, Iterable) and not isinstance(value, bytes):
        for item in value:
            yield from _image_names(item)
