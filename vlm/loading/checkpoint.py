"""From a checkpoint folder of ours to a live model. Imports torch and transformers when a model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.errors import ModelError, ResourceError
from vlm.families import Family, family_by_name
from vlm.families.classes import transformers_class
from vlm.loading.source import check_weights
from vlm.processing import Processing
from vlm.processing.files import read_json

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

MODEL_FOLDER = "model"
PROCESSOR_FOLDER = "processor"
DESCRIPTION_FILE = "checkpoint.json"


@dataclass(frozen=True)
class LoadedModel:
    """A live model with what belongs to it.

    Attributes:
        model: In eval mode; trainable through its quantised layers.
        processing: Its processor.
        family: Row of the family table.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Name of the torch dtype of computation.
        checkpoint_dir: Folder it came from.
        digest: Of the checkpoint, by which adapters know their base; None where nobody gave one.
    """

    model: PreTrainedModel
    processing: Processing
    family: Family
    device: str
    dtype: str
    checkpoint_dir: Path
    digest: str | None = None


def load_checkpoint(
    checkpoint_dir: Path, *, device: str, digest: str | None = None, on_host: bool = False
) -> LoadedModel:
    """Loads a checkpoint that `build_checkpoint` wrote.

    Args:
        checkpoint_dir: Folder with `model/`, `processor/` and `checkpoint.json`; only read.
        device: ``"cpu"`` or ``"cuda"`` (the current GPU). On a CPU the model computes in float32, whatever it is stored in.
        digest: Of the folder's content, where known.
        on_host: Leave the weights in the host's memory, for someone who moves them to the device part by part.

    Raises:
        ModelError: The folder is not whole.
        ResourceError: The device's memory does not hold the model.
    """
    checkpoint_dir = Path(checkpoint_dir)
    description = read_json(checkpoint_dir / DESCRIPTION_FILE)
    family = family_by_name(description["family"])
    dtype = "float32" if device == "cpu" else description["dtype"]
    check_weights(checkpoint_dir / MODEL_FOLDER)
    processing = Processing.from_dir(checkpoint_dir / PROCESSOR_FOLDER)
    place = "cpu" if on_host else device
    model = load_model(checkpoint_dir / MODEL_FOLDER, family, device=place, dtype=dtype)
    return LoadedModel(model, processing, family, device, dtype, checkpoint_dir, digest)


def load_model(
    folder: Path, family: Family, *, device: str, dtype: str, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """Loads weights with transformers, quantising them on the way if asked to.

    Args:
        folder: Model folder with `config.json` and safetensors.
        family: Row of the family table.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Name of the torch dtype of computation and of unquantised weights.
        quantization: How to quantise; None loads the weights as they are stored.

    Returns:
        The model in eval mode.

    Raises:
        ModelError: Weights are missing or do not fit the config.
        ResourceError: The device's memory does not hold the model.
    """
    import torch
    from safetensors import SafetensorError

    from vlm.loading.model_config import model_config
    from vlm.loading.quantization import make_trainable, silence_bitsandbytes

    silence_bitsandbytes()
    model_class = transformers_class(family, family.model_class)
    place = "cpu" if device == "cpu" else f"cuda:{torch.cuda.current_device()}"
    try:
        with progress_where_seen():
            model, report = model_class.from_pretrained(
                folder,
                config=model_config(folder, family),
                dtype=getattr(torch, dtype),
                device_map={"": place},
                attn_implementation="sdpa",
                quantization_config=quantization,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported below, with our words
                output_loading_info=True,
            )
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"the GPU's memory does not hold {family.title} from {folder.name!r} ({error}); set model.quantization to 'nf4',"
            " take a smaller model or free the GPU"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"the weights in {folder} do not fit their config.json ({error}); fetch the model again"
        ) from error
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        # transformers would go on with random values in their place.
        raise ModelError(
            f"{folder} lacks {len(missing)} weights of {family.title}, such as {missing[0]!r}; fetch the model again"
        )
    make_trainable(model, getattr(torch, dtype))
    if family.prepare_model is not None:
        family.prepare_model(model)
    return model.eval()


def save_model(model: PreTrainedModel, folder: Path, *, max_shard_size: str) -> None:
    """Writes a model so that `load_model` gives the same bits.

    transformers turns weights back into the layout that they were read from: parameters get their older names, and some
    are joined (three projections in one) or cut (an expert each). Quantised weights must not be joined, since their
    scales would not fit any more; so only the names are turned back here. Loading takes both layouts.

    Args:
        model: Any model of transformers.
        folder: Made if need be.
        max_shard_size: Largest file, such as ``"4GB"``.
    """
    from vlm.loading.stored_names import without_conversions

    with without_conversions(model):
        model.save_pretrained(folder, max_shard_size=max_shard_size)


@contextmanager
def progress_where_seen() -> Iterator[None]:
    """Keeps transformers' progress bars off standard error unless a person looks at it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if shown and not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
