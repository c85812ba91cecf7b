"""Where rows lie: an fsspec address becomes a list of files of one format, each with the split its name gives.

Light imports only (fsspec and the standard library), because `--plan` needs this in milliseconds.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import zipfile
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from vlm.config.data import BUILTIN_DATASET, SourceConfig
from vlm.errors import DataError, near_names

IMAGE_SUFFIXES = frozenset(
    [
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".webp",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".gif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
    ]
)
FORMAT_OF_SUFFIX = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
}
COMPRESSION_SUFFIXES = frozenset([".gz", ".bz2", ".xz", ".zst"])
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLIT_OF_WORD = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
# A snapshot in the Hub's cache; its first group is the repository's folder, which also holds the contents.
_SNAPSHOT = re.compile(r"(.*/(?:datasets|models)--[^/]+)/snapshots/[0-9a-f]{40}/")
# File systems whose content says where to read next, be it on this machine.
_REFUSED_PROTOCOLS = ("reference",)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class DataFile:
    """One file with rows.

    Attributes:
        path: Path on the source's file system.
        name: The same, relative to the source: what the ledger calls it.
        format: ``"parquet"``, ``"arrow"``, ``"jsonl"`` or ``"csv"``.
        split: What the name says, or None.
    """

    path: str
    name: str
    format: str
    split: str | None


@dataclass(frozen=True)
class Location:
    """A resolved source.

    Attributes:
        format: Any format but ``"auto"``.
        fs: File system, or None for ``builtin`` and ``hub``.
        root: The folder that image paths may not leave; the source itself if it is a folder.
        is_folder: Whether the source is a folder, so that everything beneath it belongs to it.
        files: Files with rows, in reading order.
    """

    format: str
    fs: Any
    root: str
    is_folder: bool
    files: tuple[DataFile, ...]


def is_local(fs: Any) -> bool:
    """Whether paths of this file system can be opened by the operating system."""
    return isinstance(fs, LocalFileSystem)


def leads_outside(path: str, root: str) -> bool:
    """Whether symbolic links take a local path out of a folder.

    The Hub's cache is one place in this sense: a snapshot's files are links into the folder of contents beside it.

    Args:
        path: Path below the folder; need not exist.
        root: The folder.
    """
    try:
        real, home = os.path.realpath(path), os.path.realpath(root)
    except ValueError:
        return False  # a name that no file can have leads nowhere
    if real == home or real.startswith(home.rstrip("/") + "/"):
        return False
    snapshot = _SNAPSHOT.match(home + "/")
    return snapshot is None or posixpath.dirname(real) != f"{snapshot[1]}/blobs"


def split_from_name(name: str) -> str | None:
    """The split that a file name, or else its nearest telling folder, gives.

    Args:
        name: Path relative to the source, such as ``"data/val-00000-of-00002.parquet"``.

    Returns:
        ``"train"``, ``"validation"``, ``"test"``, or None if no name or several are given.
    """
    for part in reversed(name.split("/")):
        words = re.split(r"[^a-z]+", part.lower())
        splits = {_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD}
        if splits:
            return splits.pop() if len(splits) == 1 else None
    return None


def format_of_name(name: str) -> str | None:
    """Format by the ending, below a compression ending where there is one; None if unknown."""
    stem, suffix = posixpath.splitext(name.lower())
    if suffix in COMPRESSION_SUFFIXES:
        suffix = posixpath.splitext(stem)[1]
        return {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv"}.get(suffix)
    return FORMAT_OF_SUFFIX.get(suffix)


def relative_name(path: str, root: str) -> str:
    """``path`` without the leading ``root``."""
    prefix = root.rstrip("/") + "/" if root.strip("/") else root
    return (path[len(prefix) :] if path.startswith(prefix) else path).lstrip("/")


def open_address(path: str) -> tuple[Any, str]:
    """Splits an address into its file system and the path there; a zip archive is opened as a folder.

    Raises:
        DataError: If no such file system is known or its package is missing.
    """
    return open_exactly(f"zip://::{path}" if path.lower().endswith(".zip") and "::" not in path else path)


def open_exactly(path: str) -> tuple[Any, str]:
    """The same, but an archive is the file that it is.

    Raises:
        DataError: If no such file system is known or its package is missing.
    """
    for link in path.split("::"):
        protocol = link.split("://", 1)[0].lower()
        if protocol in _REFUSED_PROTOCOLS:
            raise DataError(
                f"data source {path!r}: {protocol}:// reads what its content names, be it on this machine; give the address of"
                " the files themselves"
            )
    try:
        fs, fs_path = fsspec.core.url_to_fs(path)
    except FileNotFoundError as error:
        raise DataError(f"data source {path!r} does not exist. Check data.sources.") from error
    except zipfile.BadZipFile as error:
        raise DataError(
            f"data source {path!r} is no zip archive, or not a whole one: {error}. Fetch it again."
        ) from error
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise DataError(
            f"data source {path!r}: {error}. Give a path or an address that fsspec knows (file, s3, gs, memory, zip, …), "
            "and install its package (for s3: pip install 'vision-finetune[s3]')."
        ) from error
    return fs, str(fs_path)


def resolve(source: SourceConfig) -> Location:
    """Finds the files of a source.

    Raises:
        DataError: If nothing is there, or it cannot be told which format it has.
    """
    if source.format == "builtin" or (source.format == "auto" and source.path == BUILTIN_DATASET):
        return Location("builtin", None, "", False, ())
    if source.format == "hub":
        return Location("hub", None, "", False, ())
    fs, path = open_address(source.path)
    if any(character in path for character in "*?[") and not fs.exists(path):
        return _resolve_glob(source, fs, path)
    if fs.isdir(path):
        return _resolve_folder(source, fs, path)
    if fs.isfile(path):
        name = posixpath.basename(path)
        chosen = _table_format(source, name)
        return Location(
            chosen, fs, posixpath.dirname(path), False, (DataFile(path, name, chosen, split_from_name(name)),)
        )
    if (
        source.format == "auto"
        and is_local(fs)
        and _HUB_NAME.fullmatch(source.path)
        and format_of_name(source.path) is None
    ):
        return Location("hub", None, "", False, ())
    raise DataError(
        f"data source {source.path!r} does not exist. {_beside(fs, path)} Check data.sources, or give format: hub for a Hub dataset."
    )


def _beside(fs: Any, path: str) -> str:
    """What lies in the folder of a path that is not there."""
    folder = posixpath.dirname(path)
    if not fs.isdir(folder):
        return f"Its folder {folder!r} does not exist either."
    return near_names(
        posixpath.basename(path), [posixpath.basename(entry.rstrip("/")) for entry in fs.ls(folder, detail=False)]
    )


def _table_format(source: SourceConfig, name: str) -> str:
    if source.format in ("parquet", "arrow", "jsonl", "csv"):
        return source.format
    if source.format in ("imagefolder", "saved"):
        raise DataError(
            f"data source {source.path!r} is a file, but format {source.format!r} reads a folder; name the folder or set format: auto."
        )
    found = format_of_name(name)
    if found is None:
        raise DataError(
            f"data source {source.path!r}: the ending of {name!r} says nothing about its format. "
            f"Known endings: {', '.join(sorted(FORMAT_OF_SUFFIX))}. Rename it, or set the source's format."
        )
    return found


def _resolve_glob(source: SourceConfig, fs: Any, pattern: str) -> Location:
    paths = [path for path in sorted(fs.glob(pattern)) if fs.isfile(path)]
    if not paths:
        raise DataError(
            f"data source {source.path!r} matches no file. Check the pattern; '**' is needed to search in sub-folders."
        )
    # What precedes the first wildcard, so that names tell files of different folders apart.
    root = posixpath.dirname(re.split(r"[*?\[]", pattern)[0])
    files = []
    for path in paths:
        name = relative_name(path, root)
        files.append(DataFile(path, name, _table_format(source, name), split_from_name(name)))
    return Location(_only_format(source, files), fs, root, False, tuple(files))


def _only_format(source: SourceConfig, files: list[DataFile]) -> str:
    formats = sorted({file.format for file in files})
    if len(formats) > 1:
        raise DataError(
            f"data source {source.path!r} holds files of several formats ({', '.join(formats)}). "
            "Name one of them with format:, or make each its own source with a glob such as '*.parquet'."
        )
    return formats[0]


def _resolve_folder(source: SourceConfig, fs: Any, root: str) -> Location:
    listed = sorted(str(path) for path in fs.find(root, detail=False))
    names = {relative_name(path, root): path for path in listed}
    if source.format == "saved" or (
        source.format == "auto" and ("dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= set(names))
    ):
        return Location("saved", fs, root, True, tuple(_saved_files(source, fs, names)))
    visible = {
        name: path for name, path in names.items() if not any(part.startswith((".", "_")) for part in name.split("/"))
    }
    metadata = {name: path for name, path in visible.items() if posixpath.basename(name) in METADATA_NAMES}
    if source.format == "imagefolder" or (source.format == "auto" and metadata):
        return Location("imagefolder", fs, root, True, tuple(_metadata_files(source, visible, metadata)))
    files = []
    for name, path in visible.items():
        found = format_of_name(name)
        if found is not None and source.format in ("auto", found):
            files.append(DataFile(path, name, found, split_from_name(name)))
    if not files:
        if any(posixpath.splitext(name.lower())[1] in IMAGE_SUFFIXES for name in visible):
            raise _no_metadata(source)
        wanted = "data" if source.format == "auto" else source.format
        raise DataError(
            f"the folder {source.path!r} holds no {wanted} file. Known endings: {', '.join(sorted(FORMAT_OF_SUFFIX))}. Check data.sources."
        )
    return Location(_only_format(source, files), fs, root, True, tuple(files))


def _no_metadata(source: SourceConfig) -> DataError:
    return DataError(
        f"the image folder {source.path!r} has no metadata file, so nothing says what is written in its images. "
        "Add metadata.csv or metadata.jsonl (or .parquet) with the columns 'file_name' (or 'file_names') and 'text' beside the images."
    )


def _metadata_files(source: SourceConfig, visible: dict[str, str], metadata: dict[str, str]) -> list[DataFile]:
    if not metadata:
        raise _no_metadata(source)
    folders: dict[str, str] = {}
    for name in metadata:
        folder = posixpath.dirname(name)
        if folder in folders:
            raise DataError(
                f"the image folder {source.path!r} has both {folders[folder]!r} and {name!r}. Keep one metadata file in a folder."
            )
        folders[folder] = name
    return [
        DataFile(path, name, str(format_of_name(name)), split_from_name(posixpath.dirname(name)))
        for name, path in metadata.items()
    ]


def _saved_files(source: SourceConfig, fs: Any, names: dict[str, str]) -> list[DataFile]:
    """Arrow shards of a `datasets` folder in the order that its state.json gives."""
    states = [name for name in names if posixpath.basename(name) == "state.json"]
    if "dataset_dict.json" in names:
        splits = _own_json(source, fs, names["dataset_dict.json"], "splits")
        states = [f"{split}/state.json" for split in splits]
    files = []
    for state_name in states:
        if state_name not in names:
            raise DataError(
                f"the saved dataset {source.path!r} has no {state_name!r}: it was not written to the end. Save it again with save_to_disk."
            )
        folder = posixpath.dirname(state_name)
        entries = _own_json(source, fs, names[state_name], "_data_files")
        if _own_json(source, fs, names[state_name], "_indices_data_files", required=False):
            raise DataError(
                f"the saved dataset {source.path!r} keeps an index mapping. Call flatten_indices() on it and save it again."
            )
        for entry in entries:
            name = posixpath.join(
                folder, str(entry["filename"]) if isinstance(entry, dict) and "filename" in entry else "?"
            )
            if name not in names:
                raise DataError(
                    f"the saved dataset {source.path!r} lacks its file {name!r}. Save it again with save_to_disk."
                )
            files.append(DataFile(names[name], name, "arrow", split_from_name(folder) if folder else None))
    if not files:
        raise DataError(
            f"the folder {source.path!r} was not written by save_to_disk: it has no state.json. Check data.sources, or set another format."
        )
    return files


def _own_json(source: SourceConfig, fs: Any, path: str, key: str, *, required: bool = True) -> list[Any]:
    """A list that `datasets` wrote down."""
    try:
        content = json.loads(fs.cat_file(path))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the saved dataset {source.path!r}: {posixpath.basename(path)} is no JSON ({error}). Save it again with save_to_disk."
        ) from error
    found = content.get(key) if isinstance(content, dict) else None
    if found is None and not required:
        return []
    if not isinstance(found, list):
        raise DataError(
            f"the saved dataset {source.path!r}: {posixpath.basename(path)} has no list {key!r}. Save it again with save_to_disk."
        )
    return found
