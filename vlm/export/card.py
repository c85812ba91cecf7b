"""The model card, ``README.md``, of an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm.config.model import BUILTIN_MODEL, RANDOM_MODEL

_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
processor = AutoProcessor.from_pretrained("path/to/this/folder")
"""
_LOAD_MERGED = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("path/to/this/folder", dtype="auto")
processor = AutoProcessor.from_pretrained("path/to/this/folder")
"""

# Where a base model is that no path and no name on the Hub leads to.
_FOLDERS = {BUILTIN_MODEL: "vlm/builtin/weights", RANDOM_MODEL: "path/to/the/base/model"}

_LOAD_GGUF = """\
llama-mtmd-cli -m model-*.gguf --mmproj mmproj-*.gguf --temp 0 --image page.png -p "Transcribe the text in the image."
ollama create my-model -f Modelfile
"""


def model_card(
    kind: str, checkpoint: Mapping[str, Any], targets: Mapping[str, Any], figures: Mapping[str, Any] | None
) -> str:
    """Writes the card.

    Args:
        kind: Type of the export.
        checkpoint: Content of ``checkpoint.json``.
        targets: Content of the adapter's ``targets.json``.
        figures: Content of ``figures.json``, or None.

    Returns:
        Markdown with the front matter that the Hub reads.
    """
    base = checkpoint["source"]
    full = targets.get("full_finetuning")
    learning = f"Trained whole: {', '.join(full)}" if full else f"Adapted modules: {targets['num_targets']}"
    lines = ["---"]
    if base.count("/") == 1:  # only a Hub name means anything to others
        lines.append(f"base_model: {base}")
    library = {"lora": "peft", "gguf": "llama.cpp"}.get(kind, "transformers")
    lines += [
        f"library_name: {library}",
        "pipeline_tag: image-text-to-text",
        "tags:",
        "- lora" if kind == "lora" else "- full-finetuning" if full else "- merged",
        *([f"- {kind.replace('_', '-')}"] if kind in ("merged_4bit", "merged_8bit", "gguf") else []),
        "---",
        "",
        f"# {'LoRA adapter for' if kind == 'lora' else 'Fine-tuned'} {base}",
        "",
        f"- Base model: `{base}`, stored as {checkpoint['quantization']} ({checkpoint['dtype']}) during training",
        f"- {learning}; trained parameters: {targets['num_trainable_parameters']:,}"
        f" of {targets['num_base_parameters']:,}",
    ]
    if targets["modules_to_save"]:
        lines.append(f"- Trained whole: {', '.join(f'`{name}`' for name in targets['modules_to_save'])}")
    if figures is not None:
        lines += [
            "",
            f"Measured on {figures['num_rows']} rows of the {figures['split']} split, in brackets with the"
            f" {figures['confidence']:.0%} interval:",
            "",
        ]
        lines += ["| metric | tuned | base |", "|---|---|---|"]
        for entry in figures["metrics"].values():
            values = f"{_figure(entry['tuned'])} | {_figure(entry['base'])}"
            lines.append(f"| {entry['title']} ({entry['better']} is better) | {values} |")
    usage = {"lora": _LOAD_ADAPTER.format(base=_FOLDERS.get(base, base)), "gguf": _LOAD_GGUF}.get(kind, _LOAD_MERGED)
    language = "sh" if kind == "gguf" else "python"
    return "\n".join([*lines, "", f"```{language}", usage.rstrip(), "```", ""])


def _figure(entry: Mapping[str, float] | None) -> str:
    return "" if entry is None else f"{entry['value']:.4f} [{entry['low']:.4f}, {entry['high']:.4f}]"
