"""What a notebook's model saves and uploads: adapters, merged models, always with their processor."""

from __future__ import annotations

import json
import os
import re
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from vlm.config.evaluation import ExportType, GgufType
from vlm.errors import ConfigError
from vlm.facade.hub import upload
from vlm.facade.options import check_fixed
from vlm.facade.state import FacadeState, state_of

_METHODS: tuple[ExportType, ...] = ("merged_16bit", "merged_8bit", "merged_4bit", "lora")
_GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
_UNITS = {"": 1e-6, "KB": 1e-3, "MB": 1.0, "GB": 1e3}
_FIXED_SAVING: dict[str, tuple[Any, str]] = {
    "safe_serialization": (True, "files are safetensors only; leave it out"),
    "is_main_process": (True, "every process writes its own folder; leave it out"),
    "state_dict": (None, "the model's own weights are written; leave it out"),
    "save_embedding_layers": ("auto", "put 'embed_tokens' into modules_to_save; leave it out"),
    "selected_adapters": (None, "there is one adapter; leave it out"),
}


def add_saving(model: Any) -> None:
    """Gives a live model the saving methods of notebooks.

    Args:
        model: With or without adapter; changed in place.
    """
    methods: list[Callable[..., Any]] = [save_pretrained_merged, save_pretrained_gguf, push_to_hub_merged, push_to_hub]
    state = state_of(model)
    if state.full_finetuning:
        # transformers' own method writes what a trainer's checkpoint needs; here it gets the processor as well.
        own = model.save_pretrained

        def save_pretrained(model: Any, save_directory: str | Path, *args: Any, **options: Any) -> None:
            own(save_directory, *args, **options)
            state_of(model).loaded.processing.save(Path(save_directory))

        methods.append(save_pretrained)
    elif state.adapter_files:
        methods.append(save_adapter)
    for method in methods:
        name = "save_pretrained" if method is save_adapter else method.__name__
        setattr(model, name, types.MethodType(method, model))


def save_adapter(model: Any, save_directory: str | Path, tokenizer: Any = None, **options: Any) -> None:
    """Writes the adapter with its processor; plain peft and `FastVisionModel.from_pretrained` load the folder.

    Args:
        model: With an adapter.
        save_directory: Made if it is not there.
        tokenizer: The model's processor, which is written in any case.
        **options: Options of transformers' method that only one value is possible for here.

    Raises:
        ConfigError: An option would have no effect, or the processor is another model's.
    """
    state = state_of(model)
    check_fixed("save_pretrained", options, _FIXED_SAVING)
    _check_processor(state, tokenizer)
    directory = Path(save_directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_trained(model, state, directory)
    state.loaded.processing.save(directory)
    from vlm.export.card import model_card
    from vlm.lora.peft_model import TARGETS_FILE

    checkpoint = json.loads((state.loaded.checkpoint_dir / "checkpoint.json").read_text(encoding="utf-8"))
    card = model_card("lora", checkpoint, json.loads(state.adapter_files[TARGETS_FILE]), None)
    (directory / "README.md").write_text(card, encoding="utf-8", newline="\n")


def _write_trained(model: Any, state: FacadeState, directory: Path) -> None:
    """What was trained, as the core's artifact of it."""
    from vlm.lora.peft_model import CONFIG_FILE, WEIGHTS_FILE, save_tensors

    save_tensors(model, directory / WEIGHTS_FILE)
    for name, content in state.adapter_files.items():
        if name == CONFIG_FILE:
            # Under the name that the user gave, so that the folder alone leads back to its base.
            settings = {**json.loads(content), "base_model_name_or_path": state.name}
            content = (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
        (directory / name).write_bytes(content)


def save_pretrained_merged(
    model: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a model for use elsewhere, once every weight was read back and compared with what was trained.

    Args:
        model: Trained, with an adapter or with full fine-tuning.
        save_directory: Made if it is not there.
        tokenizer: The model's processor, which is written in any case.
        save_method: ``"merged_16bit"`` (a whole model in the precision of computation), ``"merged_8bit"`` or
            ``"merged_4bit"`` (quantised by bitsandbytes), or ``"lora"`` (the adapter).
        max_shard_size: Largest weights file: bytes, or text such as ``"5GB"``.

    Raises:
        ConfigError: The method is unknown or there is nothing to save by it.
        ExportError: What was written is not what was trained.
    """
    state = state_of(model)
    _check_processor(state, tokenizer)
    method = save_method.lower().replace(" ", "_")
    if method not in _METHODS:
        raise ConfigError(
            f"save_method {save_method!r} is not known here; use 'merged_16bit' for a whole model, 'merged_8bit' or 'merged_4bit' for a"
            " quantised one, or 'lora' for the adapter"
        )
    if method == "lora" and state.full_finetuning:
        raise ConfigError(
            "save_method 'lora': the model has no adapter, all its weights were trained; use 'merged_16bit'"
        )
    _export(model, _METHODS[_METHODS.index(method)], save_directory, max_shard_size_mb=_megabytes(max_shard_size))


def save_pretrained_gguf(
    model: Any, save_directory: str | Path, tokenizer: Any = None, quantization_method: str = "q8_0"
) -> None:
    """Writes a model for llama.cpp and Ollama: language model, vision tower (mmproj) and Modelfile.

    Every tensor is read back and compared with what was trained before the files get their names. Answers are not compared:
    that takes held-out rows, which the flow has.

    Args:
        model: Trained, with an adapter or with full fine-tuning.
        save_directory: Made if it is not there.
        tokenizer: The model's processor, which is written in any case.
        quantization_method: How the language model's matrices are stored, such as ``"f16"`` or ``"q4_0"``.

    Raises:
        ConfigError: The method is unknown or there is nothing to save.
        ExportError: llama.cpp does not run such a model, or what was written is not what was trained.
    """
    _check_processor(state_of(model), tokenizer)
    method = quantization_method.lower()
    if method not in _GGUF_TYPES:
        raise ConfigError(
            f"quantization_method {quantization_method!r} is not written here; use one of {', '.join(_GGUF_TYPES)}"
        )
    _export(model, "gguf", save_directory, gguf_type=_GGUF_TYPES[_GGUF_TYPES.index(method)])


def _export(model: Any, kind: ExportType, directory: str | Path, **settings: Any) -> None:
    state = state_of(model)
    if not state.adapter_files:
        raise ConfigError(
            "nothing has been trained on this model, so there is nothing to merge; call get_peft_model first"
        )
    from vlm.export import export

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Files get their names once the export has compared them with what was trained, so that none lies there which failed.
    with (
        tempfile.TemporaryDirectory() as trained,
        tempfile.TemporaryDirectory(prefix=".incomplete-", dir=directory) as stage,
    ):
        _write_trained(model, state, Path(trained))
        export(
            kind,
            state.loaded.checkpoint_dir,
            Path(trained),
            Path(stage),
            device=state.loaded.device,
            longest_tokens=state.max_seq_length,
            **({"max_shard_size_mb": _megabytes("5GB")} | settings),
        )
        for path in sorted(path for path in Path(stage).rglob("*") if path.is_file()):
            target = directory / path.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


def push_to_hub(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Uploads what `save_pretrained` writes.

    Args:
        model: With an adapter, or trained whole.
        repo_id: ``"user/name"`` on the Hub, made if it is not there.
        tokenizer: The model's processor, which is uploaded in any case.
        token: With write access; None takes the one of the login.
        private: Of a new repository.
        commit_message: Of the upload.

    Returns:
        The address of the upload.

    Raises:
        ExportError: The Hub cannot be reached or refuses.
    """
    _check_processor(state_of(model), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return upload(folder, repo_id, token, private, commit_message)


def push_to_hub_merged(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model",
    max_shard_size: int | str = "5GB",
) -> str:
    """Uploads what `save_pretrained_merged` writes.

    Args:
        model: Trained.
        repo_id: ``"user/name"`` on the Hub, made if it is not there.
        tokenizer: The model's processor, which is uploaded in any case.
        save_method: As in `save_pretrained_merged`.
        token: With write access; None takes the one of the login.
        private: Of a new repository.
        commit_message: Of the upload.
        max_shard_size: As in `save_pretrained_merged`.

    Returns:
        The address of the upload.

    Raises:
        ExportError: The Hub cannot be reached or refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained_merged(model, folder, tokenizer, save_method, max_shard_size)
        return upload(folder, repo_id, token, private, commit_message)


def _check_processor(state: FacadeState, processor: Any) -> None:
    """A processor that is not the model's own would be left out of the folder without a word."""
    own = state.loaded.processing
    if processor is not None and processor is not own.tokenizer and getattr(processor, "processing", None) is not own:
        raise ConfigError(
            f"the given {type(processor).__name__} is not the processor that came with this model, and only that is saved;"
            " give the one from FastVisionModel.from_pretrained, or none"
        )


def _megabytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", str(size).strip().upper())
    if match is None:
        raise ConfigError(f"max_shard_size {size!r} is no size; give bytes, or text such as '5GB'")
    return max(1, round(float(match[1]) * _UNITS[match[2] or ""]))
