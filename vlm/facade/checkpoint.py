"""Quantised checkpoints, made once per model and machine and then loaded from the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from vlm.cache import cache_directory
from vlm.config.model import ModelConfig
from vlm.loading.identity import model_digest, pin_revision
from vlm.progress import counting_bytes

# What decides the bytes of a checkpoint beside the model and its settings.
_PACKAGES = ("bitsandbytes", "torch", "transformers", "vision-finetune")
_FOLDER = "checkpoints"


def cached_checkpoint(model: ModelConfig, *, device: str, dtype: str) -> Path:
    """The checkpoint folder of a model, built if it is not in the cache yet.

    Args:
        model: Name and quantisation, which is not ``"auto"``.
        device: ``"cpu"`` or ``"cuda"``, where weights are quantised.
        dtype: Name of the torch dtype of computation.

    Returns:
        A folder that `load_checkpoint` opens.

    Raises:
        ModelError: There is no such model, or it is not whole.
        ResourceError: The device's memory does not hold it.
    """
    model = pin_revision(model)
    cache = cache_directory()
    with counting_bytes("hashing model") as advance:
        content = model_digest(model, cache_dir=cache, on_bytes=advance)
    settings = model.model_dump(mode="json", exclude={"name", "revision", "precision"})
    # checkpoint.json holds the name, so the same content under two names is two checkpoints.
    identity = [content, model.name, settings, device, dtype, _versions()]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = cache / _FOLDER / key
    if folder.is_dir():
        return folder
    from vlm.loading.build import build_checkpoint

    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{key[:12]}-", dir=folder.parent))
    try:
        build_checkpoint(model, draft, device=device, dtype=dtype)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # this project, run from its folder without being installed
            found[name] = None
    return found
