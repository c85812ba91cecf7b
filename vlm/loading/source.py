"""Where a model's files are: the built-in model, a folder, or the Hub; and whether they are whole.

Only safetensors and JSON files are ever fetched or read, never pickle, and no code from a repository is run.
Light imports; huggingface_hub comes in for Hub names only.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm.builtin.recipe import WEIGHTS_DIR
from vlm.config.model import BUILTIN_MODEL, RANDOM_MODEL, ModelConfig
from vlm.errors import ModelError, near_names
from vlm.hub import network_errors
from vlm.processing.files import read_json

WEIGHT_INDEX = "model.safetensors.index.json"
# What a checkpoint is made of, and all that is fetched from the Hub. Pickled weights (*.bin, *.pt) are not in it.
FETCHED_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
# Folders hold other formats of the same weights, and so do consolidated files.
_NOT_FETCHED = ("*/*", "consolidated*.safetensors")
# The format's own limit on headers.
_MAX_HEADER_BYTES = 100_000_000
# Bits per value of a tensor.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_builtin(model: ModelConfig) -> bool:
    """Whether a model is meant that is made on the fly: the toy, which also stands in for the pretrained one."""
    return model.name == RANDOM_MODEL or (model.name == BUILTIN_MODEL and not (WEIGHTS_DIR / "config.json").is_file())


def local_folder(model: ModelConfig) -> Path | None:
    """The checkpoint folder that the name leads to; None for what is made on the fly and for Hub names.

    Raises:
        ModelError: The name can only be a path, and no folder is there.
    """
    if is_builtin(model):
        return None
    if "://" in model.name:
        raise ModelError(
            f"model.name {model.name!r} is an address, and models are read from a folder or by their name on the Hub; copy it"
            " to a folder, or write user/name"
        )
    path = WEIGHTS_DIR if model.name == BUILTIN_MODEL else Path(model.name).expanduser()
    if path.is_dir():
        return path
    looks_like_path = model.name.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(model.name) or path.exists()
    if looks_like_path:
        what = "is a file" if path.exists() else "does not exist"
        raise ModelError(
            f"model.name {model.name!r} {what}, and a path must lead to a checkpoint folder with config.json and"
            f" safetensors. {_near_folders(path)}"
        )
    return None


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that matter, sorted: everything that `FETCHED_FILES` would take, none beneath."""
    return sorted({path for pattern in FETCHED_FILES for path in folder.glob(pattern) if path.is_file()})


def check_weights(folder: Path) -> None:
    """Checks that all weight files are there and as long as their headers say, without reading the weights.

    Raises:
        ModelError: Weights are missing, pickled, or cut short.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"{folder} has its weights only as {pickled[0]!r}, a pickle, which can run code when it is opened; use a"
                " revision with safetensors, or convert it with transformers' save_pretrained"
            )
        raise ModelError(f"{folder} has no *.safetensors files; give the folder that holds the model's weights")
    if (folder / WEIGHT_INDEX).is_file():
        listed = _indexed_files(folder)
        missing = sorted(listed - {path.name for path in files})
        if missing:
            raise ModelError(
                f"{folder} lacks {missing[0]!r}, one of {len(listed)} files in {WEIGHT_INDEX}; fetch the model again"
            )
    for path in files:
        check_safetensors(path)


def _indexed_files(folder: Path) -> set[str]:
    """Names of the files that the index spreads the weights over."""
    names = read_json(folder / WEIGHT_INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{folder / WEIGHT_INDEX} has no weight_map from weights to files; fetch the model again")
    # Whoever follows the index later joins its names to the folder.
    astray = sorted(name for name in set(names.values()) if Path(name).name != name)
    if astray:
        raise ModelError(
            f"{folder / WEIGHT_INDEX} names {astray[0]!r}, which is no file of its folder; fetch the model again from a"
            " source that you trust"
        )
    return set(names.values())


def check_safetensors(path: Path) -> None:
    """Checks that a file's header describes the file: every tensor as long as type and shape say, none over another.

    The file is 8 bytes of header length, a JSON header, then the tensors without gaps. No weight is read.

    Raises:
        ModelError: It does not.
    """
    size_bytes = path.stat().st_size
    problem: str | None = "its header cannot be read"
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if 2 <= header_bytes <= min(size_bytes - 8, _MAX_HEADER_BYTES):
            try:
                header = json.loads(file.read(header_bytes).decode(), object_pairs_hook=_without_repetition)
                problem = _header_problem(header, size_bytes - 8 - header_bytes)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                problem = f"its header cannot be read: {error}"
    if problem is not None:
        raise ModelError(
            f"{path} is no whole safetensors file ({problem}), as after an interrupted download; fetch it again"
        )


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _header_problem(header: Any, data_bytes: int) -> str | None:
    """What is wrong with a header before so many bytes of tensors; None if nothing is."""
    if not isinstance(header, dict):
        return "its header is no JSON object"
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        (start, end), shape, bits = entry["data_offsets"], entry["shape"], _BITS[entry["dtype"]]
        if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
            return f"{name[:80]!r} has a shape or offsets that are no whole numbers"
        if (end - start) * 8 != math.prod(shape) * bits:
            return (
                f"{name[:80]!r} has {end - start} bytes where its shape {shape} asks for {math.prod(shape) * bits // 8}"
            )
        spans.append((start, end, name))
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            return f"{name[:80]!r} starts at byte {start}, where the tensor before it ends at {position}"
        position = end
    return None if position == data_bytes else f"{data_bytes} bytes of {position}"


def fetch_from_hub(model: ModelConfig) -> Path:
    """The folder of a Hub model in the local cache, downloaded where needed.

    Raises:
        ModelError: There is no such model or revision, it is not public, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(model):
        commit = hub_commit(model)
        folder = snapshot_download(
            model.name, revision=commit, allow_patterns=list(FETCHED_FILES), ignore_patterns=list(_NOT_FETCHED)
        )
        return Path(folder)


def hub_commit(model: ModelConfig) -> str:
    """The commit that a Hub model's revision stands for now; from the local cache where the Hub cannot be reached.

    Raises:
        ModelError: There is no such model or revision, it is not public, or neither Hub nor cache has it.
    """
    if model.revision is not None and _COMMIT.fullmatch(model.revision):
        return model.revision
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    with _hub_errors(model):
        try:
            commit = HfApi().model_info(model.name, revision=model.revision, timeout=20).sha
        except network_errors(OfflineModeIsEnabled) as error:
            try:
                cached = snapshot_download(model.name, revision=model.revision, local_files_only=True)
            except LocalEntryNotFoundError:
                raise ModelError(
                    f"model.name {model.name!r} is no folder here, not in the local Hub cache, and the Hub cannot be reached"
                    f" ({type(error).__name__}); connect to the network, fetch the model beforehand, or give a folder."
                    f" {_near_known(model.name)}"
                ) from error
            commit = Path(cached).name  # snapshot folders are named by commit
        assert commit is not None
        return commit


@contextmanager
def _hub_errors(model: ModelConfig) -> Iterator[None]:
    """Turns the Hub's answers into our errors."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"model.name {model.name!r} is gated on the Hub; accept its conditions there and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"model.revision {model.revision!r} is no branch, tag or commit of {model.name!r}; look at its history on the Hub"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"model.name {model.name!r} is neither a folder here nor a model on the Hub (or a private one: `hf auth login`)."
            f" {_near_known(model.name)}"
        ) from error
    except network_errors(LocalEntryNotFoundError) as error:
        raise ModelError(
            f"the download of {model.name!r} broke off ({type(error).__name__}: {error}); run again when the network is back,"
            " what has arrived is kept"
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(f"the Hub failed on {model.name!r} ({error}); try again later or give a folder") from error


def _near_folders(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"Its parent {str(parent)!r} does not exist either."
    return near_names(path.name, [entry.name for entry in parent.iterdir() if entry.is_dir()])


def _near_known(name: str) -> str:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = [repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except CacheNotFound:
        cached = []
    folders = [path.parent.name for path in Path().glob("*/config.json")]
    return near_names(name, [BUILTIN_MODEL, *cached, *folders])
