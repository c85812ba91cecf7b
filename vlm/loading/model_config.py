"""A checkpoint's configuration as an object of transformers, whatever layout its `config.json` is in.

Imports transformers when it is called; runs nothing that comes with a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlm.errors import ModelError
from vlm.families import Family
from vlm.families.classes import transformers_class
from vlm.processing.files import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def model_config(folder: Path, family: Family) -> PretrainedConfig:
    """Reads the configuration, translated to the family's class where it is written for another one.

    Args:
        folder: Model folder with `config.json`.
        family: Row of the family table.

    Raises:
        ModelError: The file is missing, damaged, or describes another network.
    """
    import transformers

    model_class = transformers_class(family, family.model_class)
    try:
        if family.translate_config is None:
            config: PretrainedConfig = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            return config
        return model_class.config_class.from_dict(family.translate_config(read_json(folder / "config.json")))
    except ModelError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{folder / 'config.json'} does not describe a model of {family.title} ({error}); fetch the model again"
        ) from error
