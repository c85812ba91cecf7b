"""Content identity of a model, for the key of step 1; light, since `--plan` needs it in under a second."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from vlm.builtin.recipe import RECIPE
from vlm.config.model import ModelConfig
from vlm.data.stat_cache import StatCache, local_stamp
from vlm.loading.source import checkpoint_files, hub_commit, is_builtin, local_folder

_CHUNK_BYTES = 1 << 20


def model_digest(model: ModelConfig, *, cache_dir: Path | None, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 that changes when the model's content does.

    A folder, and so the built-in model that comes with the code, counts by the names and contents of its files, wherever it
    lies; a Hub model by name and commit; the toy that is made on the fly by the version of its recipe.

    Args:
        model: The model; only its name and revision matter here.
        cache_dir: Folder that remembers hashes between runs; None hashes everything anew.
        on_bytes: Called with the number of bytes just hashed, for a progress bar.

    Returns:
        64 hexadecimal digits.

    Raises:
        ModelError: There is no such folder or Hub model.
    """
    if is_builtin(model):
        return _digest({"builtin": RECIPE})
    folder = local_folder(model)
    if folder is None:
        return _digest({"hub": model.name, "commit": hub_commit(model)})
    with StatCache(cache_dir) as cache:
        files = {path.name: _file_digest(path, cache, on_bytes) for path in checkpoint_files(folder)}
    return _digest({"files": files})


def pin_revision(model: ModelConfig) -> ModelConfig:
    """The same model with its Hub revision replaced by the commit it stands for now; others come back as they are.

    Raises:
        ModelError: As `model_digest`.
    """
    if is_builtin(model) or local_folder(model) is not None:
        return model
    return model.model_copy(update={"revision": hub_commit(model)})


def _file_digest(path: Path, cache: StatCache, on_bytes: Callable[[int], None] | None) -> str:
    real = path.resolve()  # files of the Hub's cache are links to content
    stamp = local_stamp(real.stat())
    known = cache.digest(str(real), stamp)
    if known is not None:
        return known
    sha256 = hashlib.sha256()
    with real.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha256.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    cache.remember_digest(str(real), stamp, sha256.hexdigest())
    return sha256.hexdigest()


def _digest(identity: object) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
