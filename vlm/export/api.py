"""One way into all exports. Loads torch and peft when an export runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

from vlm.config.evaluation import ExportType, GgufType
from vlm.summary import Summary


@dataclass(frozen=True)
class ExportSummary(Summary):
    """What was written."""

    type: str
    """Of `ExportType`."""
    num_adapted_modules: int
    """Adapted modules in the adapter; in a merged model, all of them are merged."""
    num_files: int
    """Files in the folder."""
    size_bytes: int
    """Their size together."""


def export(
    kind: ExportType,
    checkpoint_dir: Path,
    adapter_dir: Path,
    output_dir: Path,
    *,
    max_shard_size_mb: int,
    device: str,
    gguf_type: GgufType = "q8_0",
    longest_tokens: int | None = None,
    figures: Mapping[str, Any] | None = None,
) -> ExportSummary:
    """Writes an export.

    Args:
        kind: Of `ExportType`.
        checkpoint_dir: Base model.
        adapter_dir: Trained adapter.
        output_dir: Receives the files; made if it is not there.
        max_shard_size_mb: Largest file of a merged model, in 10^6 bytes.
        device: ``cpu`` or ``cuda``, where weights are merged.
        gguf_type: How a GGUF file stores the language model's matrices.
        longest_tokens: Longest conversation that the model is meant for, for the context that Ollama gives a GGUF file;
            None leaves that to Ollama.
        figures: Content of ``figures.json`` for the model card, if wanted.

    Returns:
        Counts.

    Raises:
        ExportError: The adapter does not fit the checkpoint, or what was written is not what was trained.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if kind == "lora":
        from vlm.export.adapter import export_lora

        num_modules = export_lora(checkpoint_dir, adapter_dir, output_dir, figures=figures)
    elif kind == "merged_16bit":
        from vlm.export.merged import export_merged_16bit

        num_modules = export_merged_16bit(
            checkpoint_dir, adapter_dir, output_dir, max_shard_size_mb=max_shard_size_mb, device=device, figures=figures
        )
    elif kind == "merged_4bit" or kind == "merged_8bit":
        from vlm.export.quantized import export_quantized

        num_modules = export_quantized(
            4 if kind == "merged_4bit" else 8,
            checkpoint_dir,
            adapter_dir,
            output_dir,
            max_shard_size_mb=max_shard_size_mb,
            device=device,
            figures=figures,
        )
    elif kind == "gguf":
        from vlm.export.gguf.write import export_gguf

        num_modules = export_gguf(
            checkpoint_dir,
            adapter_dir,
            output_dir,
            gguf_type=gguf_type,
            device=device,
            longest_tokens=longest_tokens,
            figures=figures,
        )
    else:
        assert_never(kind)
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    return ExportSummary(kind, num_modules, len(files), sum(path.stat().st_size for path in files))
