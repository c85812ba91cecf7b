"""Copies an artifact's files to where somebody else expects them.

A folder with the marker file is complete. While a copy is under way, another file lists what is there already, so that a
copy that was cut off goes on where it stood. Files of the artifact that lay there before go, others stay. A repository on
the Hub gets all of this in one commit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from artifacts.refs import ArtifactRef
from tasks.graph import Json
from tasks.session import Session
from vlm.errors import ExportError
from vlm.progress import counting_bytes

MARKER = "artifact.json"
UNDER_WAY = "artifact.incomplete.json"
_PART = ".part"


def deliver(session: Session, ref: ArtifactRef, address: str) -> None:
    """Puts the files of an artifact at an address, unless they are there already.

    Args:
        session: The run.
        ref: The artifact.
        address: fsspec address of the folder that receives the files, or ``hf://user/name/folder``.

    Raises:
        ExportError: If the address cannot be written.
    """
    sizes = {file.path: file.size_bytes for file in session.store.manifest(ref).files}
    marker = {"digest": ref.digest, "kind": ref.kind, "files": sorted(sizes)}
    if address.startswith("hf://"):
        from vlm.export.hub import upload_export

        upload_export(lambda: session.local(ref), address, marker, MARKER)
        return
    try:
        filesystem, root = fsspec.core.url_to_fs(address)
        _copy(session, ref, filesystem, root, marker, sizes)
    except (OSError, ImportError) as error:
        raise ExportError(
            f"export.destination {address!r} cannot be written: {error}; give an address that you may write to,"
            " or leave it out: the export is in the store all the same"
        ) from error


def _copy(session: Session, ref: ArtifactRef, filesystem: Any, root: str, marker: Json, sizes: dict[str, int]) -> None:
    there = _read(filesystem, f"{root}/{MARKER}")
    if there.get("digest") == ref.digest:
        return
    under_way = _read(filesystem, f"{root}/{UNDER_WAY}")
    filesystem.makedirs(root, exist_ok=True)
    if under_way.get("digest") != ref.digest:
        # Files of another export go first, also those of the same name: what is found later belongs to this one. No
        # digest is on record until they are gone, but what may lie here is.
        listed = sorted({*there.get("files", []), *under_way.get("files", []), *sizes})
        _write(filesystem, f"{root}/{UNDER_WAY}", {"digest": None, "files": listed})
        for name in (MARKER, *listed):
            if filesystem.exists(f"{root}/{name}"):
                filesystem.rm_file(f"{root}/{name}")
        _write(filesystem, f"{root}/{UNDER_WAY}", {"digest": ref.digest, "files": sorted(sizes)})
    folder = session.local(ref)
    with counting_bytes("copying export", ref.size_bytes) as advance:
        for name, size_bytes in sizes.items():
            target = f"{root}/{name}"
            if not (filesystem.exists(target) and filesystem.size(target) == size_bytes):
                filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                _put(filesystem, folder / name, target)
            advance(size_bytes)
    _write(filesystem, f"{root}/{MARKER}", marker)
    filesystem.rm_file(f"{root}/{UNDER_WAY}")


def _put(filesystem: Any, source: Path, target: str) -> None:
    """Copies a file, which is whole as soon as it has its name. Object stores do that by themselves."""
    if isinstance(filesystem, LocalFileSystem):
        filesystem.put_file(str(source), target + _PART)
        os.replace(target + _PART, target)
    else:
        filesystem.put_file(str(source), target)


def _write(filesystem: Any, path: str, content: Json) -> None:
    filesystem.pipe_file(path, json.dumps(content).encode())


def _read(filesystem: Any, path: str) -> Json:
    """Content of a marker file; empty if there is none, or it was cut off."""
    if not filesystem.exists(path):
        return {}
    try:
        content = json.loads(filesystem.cat_file(path))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
