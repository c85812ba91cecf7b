"""Whether a model can become GGUF files at all, told before any work. Imports nothing heavy but for a family that can."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vlm.errors import ExportError
from vlm.families import FAMILIES, Family
from vlm.families.gguf import GgufLayout


def check_supported(family: Family) -> GgufLayout:
    """The family's layout in GGUF files.

    Args:
        family: Row of the family table.

    Raises:
        ExportError: llama.cpp does not run the family, or the package that writes the files is missing.
    """
    if family.gguf is None:
        known = ", ".join(sorted(other.title for other in FAMILIES.values() if other.gguf is not None))
        raise ExportError(
            f"export.types has 'gguf', but {family.title} cannot be written for llama.cpp here, only {known}; take 'gguf' out"
            " of export.types, or use 'merged_16bit' with vLLM or transformers"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ExportError(
            "export.types has 'gguf', which needs the package gguf; install it with `pip install 'vision-finetune[gguf]'`"
        )
    return family.gguf


def check_model(family: Family, model_dir: Path, processor_dir: Path) -> None:
    """Refuses a model that cannot become GGUF files. Reads no weights.

    Args:
        family: Row of the family table.
        model_dir: Folder with the model's `config.json`.
        processor_dir: Folder with its processor; of a model as it is published, the same.

    Raises:
        ExportError: llama.cpp does not run such a model, or the package that writes the files is missing.
    """
    check_supported(family)
    from vlm.export.gguf.design import gguf_design
    from vlm.loading.model_config import model_config
    from vlm.loading.quantization import blueprint
    from vlm.processing import Processing

    bare = blueprint(family, model_config(model_dir, family))
    gguf_design(family, bare, bare.state_dict(), Processing.from_dir(processor_dir))


def llama_cpp_is_there() -> bool:
    """Whether the package is installed with which llama.cpp itself runs exported files."""
    return importlib.util.find_spec("llama_cpp") is not None


def note_unrun(export_dir: Path) -> str:
    """Says on an export's card that llama.cpp itself has not run it.

    Args:
        export_dir: Folder of the export.

    Returns:
        The sentence.
    """
    sentence = (
        "Each tensor was read back and compared with the trained model's; llama.cpp itself did not run the files, since"
        " llama_cpp was not installed (`pip install 'vision-finetune[llama]'`)."
    )
    with (export_dir / "README.md").open("a", encoding="utf-8", newline="\n") as card:
        card.write(f"\n{sentence}\n")
    return sentence
