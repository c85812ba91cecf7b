"""Working folders inside a store (or its cache), so that what is finished is renamed into place, not copied.

tmp/<random>/owner.lock    held with flock while the owner lives
tmp/<random>/owner.json    host of the owner: a lock says nothing about owners on other machines
tmp/<random>/data/         the folder that is handed out
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from artifacts.errors import writing
from artifacts.locks import file_lock, remove_if_free


@contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """Gives an empty folder below ``<root>/tmp`` that is removed afterwards, whatever happens.

    Raises:
        StoreWriteError: If it cannot be made.
    """
    folder = root / "tmp" / os.urandom(8).hex()
    try:
        with file_lock(folder / "owner.lock"):
            with writing(str(root)):
                (folder / "owner.json").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
                (folder / "data").mkdir()
            yield folder / "data"
    finally:
        remove_tree(folder)


def stale_scratch(root: Path, grace_seconds: float) -> list[tuple[Path, int]]:
    """Finds what dead owners left behind.

    Args:
        root: The store's root, or its cache.
        grace_seconds: Age after which folders of other hosts, and loose files, count as left behind.

    Returns:
        Paths below ``<root>/tmp`` with their sizes in bytes.
    """
    stale = []
    for path in sorted((root / "tmp").glob("*")):
        try:
            age_seconds = time.time() - path.stat().st_mtime
            if not path.is_dir():
                is_stale = age_seconds > grace_seconds
            elif _is_of_this_host(path):
                is_stale = remove_if_free(path / "owner.lock", dry_run=True)
            else:
                is_stale = age_seconds > grace_seconds
            if is_stale:
                stale.append((path, tree_size(path)))
        except FileNotFoundError:
            continue  # its owner has just finished
    return stale


def _is_of_this_host(folder: Path) -> bool:
    try:
        return json.loads((folder / "owner.json").read_bytes())["host"] == socket.gethostname()
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False  # its owner was killed while making it, or is making it now: wait for the grace time


def tree_size(path: Path) -> int:
    """Returns the size in bytes of a file, or of all files below a folder."""
    if not path.is_dir():
        return path.stat().st_size
    total = 0
    for place, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total


def last_change(path: Path) -> float:
    """Returns when a folder, or anything below it, was last changed, in seconds since 1970.

    What others remove meanwhile does not count; a folder that is gone has changed just now.
    """
    times = []
    for place, folders, names in os.walk(path):
        for name in (".", *folders, *names):
            with suppress(FileNotFoundError):
                times.append(os.lstat(os.path.join(place, name)).st_mtime)
    return max(times, default=time.time())


def remove_tree(path: Path) -> None:
    """Removes a file or a folder, also one with read-only folders inside; nothing happens if there is none."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path)
    except PermissionError:
        for place, _, _ in os.walk(path):  # top down, so that each folder can be listed
            os.chmod(place, stat.S_IRWXU)
        shutil.rmtree(path)
    except FileNotFoundError:
        # somebody else is removing it too
        shutil.rmtree(path, ignore_errors=True)
