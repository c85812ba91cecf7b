"""The files of a processor folder: what is copied, and the small file of our own beside them.

`processing.json` holds what a processor folder alone does not tell: the family, the context length and the stop tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.errors import ModelError
from vlm.families import Family, context_length_tokens, family_by_name, family_for_config, text_config

OWN_FILE = "processing.json"
_FILE_NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)
_TEMPLATE_FOLDER = "additional_chat_templates"


def copy_processor_files(source: Path, destination: Path) -> None:
    """Copies the files of tokenizer, image processor, video processor and chat template as they are."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in _FILE_NAMES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
    for template in sorted((source / _TEMPLATE_FOLDER).glob("*.jinja")):
        (destination / _TEMPLATE_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(template, destination / _TEMPLATE_FOLDER / template.name)


def has_image_processor(folder: Path) -> bool:
    """Whether a folder says how images are prepared; older files of processors hold other settings only."""
    if (folder / "preprocessor_config.json").is_file():
        return True
    path = folder / "processor_config.json"
    return path.is_file() and "image_processor" in read_json(path)


def describe(folder: Path) -> tuple[Family, int | None, tuple[int, ...]]:
    """Family, context length in tokens and stop token ids of a processor folder or a whole checkpoint folder.

    Raises:
        ModelError: The folder has neither our own file nor a model's `config.json`.
    """
    if (folder / OWN_FILE).is_file():
        own = read_json(folder / OWN_FILE)
        return family_by_name(own["family"]), own["context_length_tokens"], tuple(own["stop_token_ids"])
    config = read_json(folder / "config.json")
    family = family_for_config(config)
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    for section in (generation, config, text_config(config)):
        stop = section.get("eos_token_id")
        if stop is not None:
            stop_ids = tuple(stop) if isinstance(stop, list) else (stop,)
            return family, context_length_tokens(config), stop_ids
    return family, context_length_tokens(config), ()


def write_own_file(folder: Path, family: Family, context_length: int | None, stop_token_ids: tuple[int, ...]) -> None:
    """Writes `processing.json`."""
    own = {
        "context_length_tokens": context_length,
        "family": family.model_type,
        "stop_token_ids": list(stop_token_ids),
    }
    (folder / OWN_FILE).write_text(json.dumps(own, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Mapping[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: The file is missing, is no JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} has no {path.name}, which every checkpoint has; give the folder that holds it"
        ) from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and lists in lists
        raise ModelError(f"{path} is no valid JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object; fetch the checkpoint again")
    return content
