"""Checkpoints of a running training: complete or not there.

A checkpoint folder counts only with its marker, which is written last and lists every file's size and hash together
with the identity of the training. A folder that a killed process left half-written has none, so it is never resumed
from; nor is a checkpoint of another training.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MARKER = "complete.json"
_PART_BYTES, _BLOCK_BYTES, _MOST_THREADS = 2**28, 2**20, 16
_NAME = re.compile(r"checkpoint-(\d+)")


def training_identity(parts: Mapping[str, Path | str]) -> str:
    """Names a training by what decides its course.

    Args:
        parts: Files by name, whose content counts, and plain texts.

    Returns:
        A sha256 digest.
    """
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        content = part.read_bytes() if isinstance(part, Path) else part.encode()
        digest.update(f"{name}:{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def mark_complete(folder: Path, step: int, identity: str) -> None:
    """Flushes a written checkpoint to disk and declares it complete.

    Args:
        folder: Its folder.
        step: The last finished step.
        identity: Of the training.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as handle:
            # On the disk before it is read again: what is hashed is what is there.
            os.fsync(handle.fileno())
        files[path.name] = {"size_bytes": path.stat().st_size, "sha256_of_parts": _digest(path)}
    content = json.dumps({"step": step, "identity": identity, "files": files}, indent=2, sort_keys=True)
    draft = folder / f".{MARKER}"
    with draft.open("w", encoding="utf-8") as handle:
        handle.write(content + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    draft.replace(folder / MARKER)


def newest_complete(work_dir: Path, identity: str) -> tuple[int, Path] | None:
    """Finds the checkpoint to resume from.

    Args:
        work_dir: Folder of the checkpoints.
        identity: Of the training; checkpoints of others do not count.

    Returns:
        The last finished step and the folder, or None.
    """
    for step, folder in sorted(_folders(work_dir), reverse=True):
        if _is_complete(folder, step, identity):
            return step, folder
    return None


def remove_others(work_dir: Path, keep: Path | None) -> None:
    """Removes all checkpoints but one, half-written ones included.

    Args:
        work_dir: Folder of the checkpoints.
        keep: The one to keep, or None to remove all.
    """
    for _, folder in _folders(work_dir):
        if folder != keep:
            # The marker goes first: a removal that is cut short must not leave a folder that counts.
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)


def _folders(work_dir: Path) -> list[tuple[int, Path]]:
    if not work_dir.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in work_dir.iterdir() if path.is_dir()]
    return [(int(match[1]), path) for match, path in matches if match]


def _is_complete(folder: Path, step: int, identity: str) -> bool:
    if not (folder / MARKER).is_file():
        return False
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        if marker["step"] != step or marker["identity"] != identity:
            return False
        return all(_is_whole(folder / name, file) for name, file in marker["files"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False  # a marker that was damaged vouches for nothing


def _is_whole(path: Path, file: Mapping[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != file["size_bytes"]:
        return False
    return bool(_digest(path) == file["sha256_of_parts"])


def _digest(path: Path) -> str:
    """A sha256 digest over the digests of a file's parts, which are made side by side: a checkpoint may have 100 GB."""

    def of_part(start: int) -> bytes:
        digest, left = hashlib.sha256(), _PART_BYTES
        with path.open("rb") as handle:
            handle.seek(start)
            while left and (block := handle.read(min(left, _BLOCK_BYTES))):
                digest.update(block)
                left -= len(block)
        return digest.digest()

    with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
        return hashlib.sha256(b"".join(pool.map(of_part, range(0, path.stat().st_size, _PART_BYTES)))).hexdigest()
