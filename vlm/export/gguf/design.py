"""What both GGUF files hold but the weights: which tensors, and the values in their heads. Loads torch.

All of it follows from the base model, so that a model which llama.cpp cannot run is refused before it is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm.export.gguf.metadata import language_metadata, tokenizer_metadata, vision_metadata
from vlm.export.gguf.support import check_supported
from vlm.export.gguf.tensors import Destination, File, destinations
from vlm.families import Family
from vlm.processing import Processing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GgufDesign:
    """Two files without their weights."""

    tensors: dict[str, list[Destination]]
    """Tensors of both files by the parameter that they come from."""
    architectures: dict[File, str]
    """llama.cpp's name of what each file is."""
    heads: dict[File, dict[str, Any]]
    """Values that follow from the model."""


def gguf_design(family: Family, bare: PreTrainedModel, names: Iterable[str], processing: Processing) -> GgufDesign:
    """Finds a place for everything of a model.

    Args:
        family: Row of the family table.
        bare: The model, perhaps without storage.
        names: Full names of the parameters to be written.
        processing: The model's processor.

    Raises:
        ExportError: llama.cpp does not run such a model, or the package that writes the files is missing.
    """
    layout = check_supported(family)
    config = bare.config.to_dict()
    row_break = layout.row_break_token
    break_id = None if row_break is None else processing.tokenizer.convert_tokens_to_ids(row_break)
    state = bare.state_dict()
    found = destinations(layout, {name: state[name].shape for name in names}, config, break_id)
    tokenizer = tokenizer_metadata(layout, processing, config["text_config"]["vocab_size"])
    heads: dict[File, dict[str, Any]] = {
        "language": {**language_metadata(layout, config), **tokenizer},
        "vision": {"general.type": "mmproj", **vision_metadata(layout, config, processing)},
    }
    return GgufDesign(found, {"language": layout.architecture, "vision": "clip"}, heads)
