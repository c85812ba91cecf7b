"""What an evaluation scores: an adapter, a whole model, or answers that somebody else generated. Light imports."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.config.evaluate import SubjectConfig, SubjectKind
from vlm.data.locations import is_local, open_exactly
from vlm.data.stat_cache import StatCache, local_stamp, remote_stamp
from vlm.errors import DataError, LoraError, ModelError, shown
from vlm.evaluation.predictions import ROWS_FILE

# As vlm.lora writes them; named here again because that package loads torch.
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TARGETS = "targets.json"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Subject:
    """A subject that was found.

    Attributes:
        kind: What it is.
        name: Its last path component, for headings.
        fs: Its file system; None for a whole model, whose name step 1 resolves itself.
        files: Paths of the files that matter by the names they get here.
        full_finetuning: Parts that were trained whole, without an adapter.
    """

    kind: SubjectKind
    name: str
    fs: Any = None
    files: tuple[tuple[str, str], ...] = ()
    full_finetuning: tuple[str, ...] = ()


def find_subject(config: SubjectConfig) -> Subject:
    """Looks at what lies at the subject's path.

    Args:
        config: Path and kind.

    Raises:
        DataError: Nothing usable is there, or it is not of the kind that was asked for.
        LoraError: An adapter lacks a file.
        ModelError: A GGUF file, which is not run here.
    """
    name = posixpath.basename(config.path.rstrip("/")) or config.path
    if config.kind == "model":
        return Subject("model", name)
    fs, path = open_exactly(config.path)
    if not fs.exists(path):
        if config.kind == "auto" and _may_be_hub_name(config.path):
            return Subject("model", name)
        raise DataError(
            f"subject.path {config.path!r} does not exist; give an adapter folder, a model folder or Hub name, or a"
            " predictions file"
        )
    names = {path} if fs.isfile(path) else {str(entry) for entry in fs.ls(path, detail=False)}
    found = {posixpath.basename(str(entry).rstrip("/")): str(entry) for entry in names}
    kind = _kind_of(found, is_file=fs.isfile(path)) if config.kind == "auto" else config.kind
    if config.targets == "file" and kind != "predictions":
        raise DataError(
            f"subject.targets 'file' is for a predictions file, but subject.path {config.path!r} is a {kind}; set it to 'dataset'"
        )
    if kind == "predictions":
        if not fs.isfile(path) and ROWS_FILE not in found:
            raise DataError(f"subject.path {config.path!r} has no {ROWS_FILE}; give a predictions file")
        return Subject("predictions", name, fs, ((ROWS_FILE, path if fs.isfile(path) else found[ROWS_FILE]),))
    if kind == "adapter":
        return _adapter(config, name, fs, found)
    if kind == "model":
        return Subject("model", name)
    if any(entry.endswith(".gguf") for entry in found):
        raise ModelError(
            f"subject.path {config.path!r} is a GGUF model, which llama.cpp runs; write its answers to a predictions file"
            " (JSON lines with `id` and `prediction`) and give that"
        )
    listed = ", ".join(sorted(found)[:6]) or "nothing"
    raise DataError(
        f"subject.path {config.path!r} is no adapter, model or predictions (it has: {listed}); an adapter has"
        f" {ADAPTER_WEIGHTS}, a model config.json and *.safetensors, predictions end in .jsonl"
    )


def subject_digest(
    subject: Subject, *, cache_dir: Path | None, on_bytes: Callable[[int], None] | None = None
) -> dict[str, str]:
    """SHA-256 of each file of an adapter or a predictions file.

    Args:
        subject: What was found; not a whole model.
        cache_dir: Folder that remembers hashes between runs; None hashes everything anew.
        on_bytes: Called with the number of bytes just hashed.
    """
    with StatCache(cache_dir) as cache:
        return {name: _file_digest(subject.fs, path, cache, on_bytes) for name, path in subject.files}


def import_adapter(subject: Subject, output_dir: Path) -> int:
    """Copies an adapter's files, and no others: an export of an adapter is then the same artifact as the adapter.

    Args:
        subject: An adapter.
        output_dir: An existing folder.

    Returns:
        Bytes copied.
    """
    for name, path in subject.files:
        subject.fs.get_file(path, str(output_dir / name))
    return sum((output_dir / name).stat().st_size for name, _ in subject.files)


def prediction_lines(subject: Subject) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a predictions file with their line numbers, from 1.

    Args:
        subject: Predictions.

    Raises:
        DataError: A line is no JSON object, or lacks `id` or `prediction`.
    """
    path = subject.files[0][1]
    with subject.fs.open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} line {number} is no JSON ({error}); write one JSON object per line") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path} line {number} is a {type(row).__name__}; write one JSON object with `id` and `prediction` per line"
                )
            for field in ("id", "prediction"):
                if field not in row:
                    raise DataError(f"{path} line {number} has no {field!r}, only {', '.join(sorted(row))}; add it")
            if not isinstance(row["prediction"], str):
                raise DataError(
                    f'{path} line {number} has {shown(row["prediction"])} as its prediction; it must be text, "" where there is none'
                )
            yield number, row


def _kind_of(found: dict[str, str], *, is_file: bool) -> SubjectKind | None:
    if is_file:
        return "predictions" if next(iter(found)).endswith((".jsonl", ".ndjson")) else None
    if ROWS_FILE in found:
        return "predictions"
    if ADAPTER_WEIGHTS in found:
        return "adapter"
    if "config.json" in found and any(name.endswith(".safetensors") for name in found):
        return "model"
    return None


def _adapter(config: SubjectConfig, name: str, fs: Any, found: dict[str, str]) -> Subject:
    full: tuple[str, ...] = ()
    if ADAPTER_TARGETS in found:
        try:
            full = tuple(json.loads(fs.cat_file(found[ADAPTER_TARGETS])).get("full_finetuning", ()))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise LoraError(
                f"subject.path {config.path!r}: {ADAPTER_TARGETS} is not what training writes ({error}); give the folder as it was"
            ) from error
    needed = (ADAPTER_WEIGHTS,) if full else (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
    missing = [needed_name for needed_name in needed if needed_name not in found]
    if missing:
        raise LoraError(f"subject.path {config.path!r} has no {missing[0]}; give the folder of an adapter")
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_TARGETS)
    files = tuple((wanted, found[wanted]) for wanted in names if wanted in found)
    return Subject("adapter", name, fs, files, full)


def _may_be_hub_name(path: str) -> bool:
    return "://" not in path and path.count("/") == 1 and not path.startswith((".", "/", "~"))


def _file_digest(fs: Any, path: str, cache: StatCache, on_bytes: Callable[[int], None] | None) -> str:
    if is_local(fs):
        key, stamp = path, local_stamp(Path(path).stat())
    else:
        key, stamp = fs.unstrip_protocol(path), remote_stamp(fs.info(path))
    known = cache.digest(key, stamp)
    if known is not None:
        return known
    sha256 = hashlib.sha256()
    with fs.open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            sha256.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    cache.remember_digest(key, stamp, sha256.hexdigest())
    return sha256.hexdigest()
