"""Writes safetensors files of bounded size with an index, one file in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


class ShardWriter:
    """Collects tensors and writes a file whenever the next one would not fit.

    Args:
        directory: An existing folder.
        max_shard_size_bytes: Largest file; a single larger tensor gets a file of its own.
    """

    def __init__(self, directory: Path, max_shard_size_bytes: int) -> None:
        self._directory = directory
        self._max = max_shard_size_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total_bytes = 0

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Takes one tensor.

        Args:
            key: Its name.
            tensor: On any device.
        """
        tensor = tensor.to("cpu").contiguous()
        if self._pending and self._pending_bytes + tensor.nbytes > self._max:
            self._flush()
        self._pending[key] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> dict[str, Path]:
        """Writes the rest, gives the files their final names, and the index where there is more than one.

        Returns:
            The file of each key.
        """
        self._flush()
        placed: dict[str, Path] = {}
        for number, (draft, keys) in enumerate(self._shards, 1):
            count = len(self._shards)
            name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            path = draft.rename(self._directory / name)
            placed.update(dict.fromkeys(keys, path))
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": {key: path.name for key, path in sorted(placed.items())},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._directory / "model.safetensors.index.json").write_text(text, encoding="utf-8", newline="\n")
        return placed

    def _flush(self) -> None:
        if not self._pending:
            return
        draft = self._directory / f"draft-{len(self._shards):05d}.safetensors"
        save_file(self._pending, draft, metadata={"format": "pt"})
        self._shards.append((draft, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0
