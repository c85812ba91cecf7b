"""Export ``lora``: the adapter, loadable with plain peft, with the processor and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.errors import ExportError
from vlm.export.card import model_card
from vlm.lora.file_keys import PREFIX, key_of
from vlm.lora.peft_model import CONFIG_FILE, TARGETS_FILE, WEIGHTS_FILE


def export_lora(
    checkpoint_dir: Path, adapter_dir: Path, output_dir: Path, *, figures: Mapping[str, Any] | None = None
) -> int:
    """Writes the adapter's files, the processor's files and ``README.md`` into one folder.

    Args:
        checkpoint_dir: Base model, for its processor.
        adapter_dir: Trained adapter.
        output_dir: An existing folder.
        figures: Content of ``figures.json`` for the card, if wanted.

    Returns:
        Number of adapted modules.

    Raises:
        ExportError: The adapter's weights are not those of its list of targets.
    """
    targets = json.loads((adapter_dir / TARGETS_FILE).read_text(encoding="utf-8"))
    if targets.get("full_finetuning"):
        raise ExportError(
            f"export.types has 'lora' but {', '.join(targets['full_finetuning'])} were trained whole, without an adapter;"
            " export 'merged_16bit'"
        )
    _check_complete(adapter_dir, targets)
    copy_files(checkpoint_dir / "processor", output_dir)
    for name in (CONFIG_FILE, WEIGHTS_FILE, TARGETS_FILE):
        shutil.copyfile(adapter_dir / name, output_dir / name)
    checkpoint = json.loads((checkpoint_dir / "checkpoint.json").read_text(encoding="utf-8"))
    card = model_card("lora", checkpoint, targets, figures)
    (output_dir / "README.md").write_text(card, encoding="utf-8", newline="\n")
    return int(targets["num_targets"])


def copy_files(source: Path, destination: Path) -> None:
    """Copies the files of one folder into another, as new files that may be written to.

    Args:
        source: A folder, perhaps read-only.
        destination: An existing folder.
    """
    for path in sorted(source.rglob("*")):
        if path.is_file():
            target = destination / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _check_complete(adapter_dir: Path, targets: Mapping[str, Any]) -> None:
    from safetensors import safe_open

    with safe_open(adapter_dir / WEIGHTS_FILE, framework="pt") as file:
        ranks = {
            key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): file.get_slice(key).get_shape()[0]
            for key in file.keys()  # noqa: SIM118, a file, not a dict
            if key.endswith(".lora_A.weight")
        }
    expected = {key_of(target): target["rank"] * target.get("num_experts", 1) for target in targets["targets"]}
    if ranks != expected:
        differing = sorted(set(ranks.items()) ^ set(expected.items()))
        raise ExportError(
            f"the adapter's weights and its {TARGETS_FILE} disagree on {len(differing)} modules, first {differing[0]};"
            " train again"
        )
