"""Copies an artifact's files to where somebody else expects them."""

from __future__ import annotations

import json

import fsspec

from artifacts.refs import ArtifactRef
from tasks.session import Session
from vlm.errors import ExportError
from vlm.progress import counting_bytes

MARKER = "artifact.json"


def deliver(session: Session, ref: ArtifactRef, address: str) -> None:
    """Puts the files of an artifact at an fsspec address, unless they are there already.

    The marker file is removed first and written last: a folder with a marker is complete.

    Args:
        session: The run.
        ref: The artifact.
        address: Folder that receives the files.

    Raises:
        ExportError: If the address cannot be written.
    """
    try:
        filesystem, root = fsspec.core.url_to_fs(address)
        marker = f"{root}/{MARKER}"
        if filesystem.exists(marker):
            if json.loads(filesystem.cat_file(marker)).get("digest") == ref.digest:
                return
            filesystem.rm_file(marker)
        folder = session.local(ref)
        with counting_bytes("copying export", ref.size_bytes) as advance:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    target = f"{root}/{path.relative_to(folder).as_posix()}"
                    filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                    filesystem.put_file(str(path), target)
                    advance(path.stat().st_size)
        filesystem.pipe_file(marker, json.dumps({"digest": ref.digest, "kind": ref.kind}).encode())
    except (OSError, ImportError) as error:
        raise ExportError(
            f"export.destination {address!r} cannot be written: {error}; give an address that you may write to,"
            " or leave it out: the export is in the store all the same"
        ) from error
