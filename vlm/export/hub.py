"""Exports into a repository on the Hub, in one commit. Its client is imported when one starts.

The client uploads large files by their content before it commits, and leaves out those that the Hub has already: an
upload that was cut off goes on where it stood, and until the commit nobody sees any of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlm.errors import ExportError
from vlm.facade.hub import hub_errors

_ADDRESS = re.compile(r"hf://(?:models/)?([\w.-]+/[\w.-]+)(?:/(.+?))?/*")
_OTHER_KINDS = ("hf://datasets/", "hf://spaces/", "hf://buckets/")


def parse_address(address: str) -> tuple[str, str]:
    """Repository and folder that an address means.

    Args:
        address: ``hf://user/name`` or ``hf://user/name/folder``.

    Returns:
        Name of the repository, and what stands before each file's name: empty, or a path that ends in a slash.

    Raises:
        ExportError: The address is no repository of models.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or address.startswith(_OTHER_KINDS):
        raise ExportError(
            f"export.destination {address!r} is no repository of models; give hf://user/name, or hf://user/name/folder"
        )
    return match[1], f"{match[2]}/" if match[2] else ""


def upload_export(folder: Callable[[], Path], address: str, marker: Mapping[str, Any], marker_name: str) -> None:
    """Commits the files of an export, unless they are there already.

    Args:
        folder: Gives the local folder, where it is needed.
        address: ``hf://user/name`` or ``hf://user/name/folder``; the repository is made, private, if it is not there.
        marker: Names the export (``digest``) and its files (``files``).
        marker_name: File that holds the marker beside them.

    Raises:
        ExportError: The address is no repository of models, or the Hub cannot be reached or refuses.
    """
    repository, prefix = parse_address(address)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    with hub_errors(repository):
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        present = set(api.list_repo_files(repository))
        there: dict[str, Any] = {}
        if prefix + marker_name in present:
            path = api.hf_hub_download(repository, prefix + marker_name)
            there = json.loads(Path(path).read_text(encoding="utf-8"))
        if there.get("digest") == marker["digest"]:
            return
        local = folder()
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=prefix + name, path_or_fileobj=str(local / name))
            for name in marker["files"]
        ]
        text = json.dumps(marker, indent=2, sort_keys=True) + "\n"
        operations.append(CommitOperationAdd(path_in_repo=prefix + marker_name, path_or_fileobj=text.encode()))
        gone = {prefix + name for name in set(there.get("files", [])) - set(marker["files"])} & present
        operations += [CommitOperationDelete(path_in_repo=name) for name in sorted(gone)]
        api.create_commit(repository, operations, commit_message=f"Export {marker['digest'][:12]}")
