"""Writes both GGUF files, one tensor in memory at a time, and compares every tensor with the merged model. Loads gguf.

model-<type>.gguf    the language model with its tokenizer
mmproj-<type>.gguf   the vision tower and the projector, in 16 bit
Modelfile            for ``ollama create``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlm.config.evaluation import GgufType
from vlm.errors import ExportError
from vlm.export.gguf.design import gguf_design
from vlm.export.gguf.metadata import image_token_limits
from vlm.export.gguf.modelfile import modelfile
from vlm.export.gguf.tensors import Destination, File, in_order
from vlm.export.merging import MergedModel
from vlm.processing import Processing

_FILE_TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
_BLOCK = 32
# The most that a format moves a weight, in units of the largest of its block: half a step of its codes, plus the
# rounding of its float16 scales. Codes reach from -8 to 7 (4 bits), -16 to 15 and -128 to 127, whose ends are cut off by
# a whole step; formats with an offset divide the span of a block, at most twice the largest, by 15 or 31.
_BOUNDS = {
    "F32": 0.0,
    "F16": 2**-11,
    "BF16": 2**-8,
    "Q8_0": 0.5 / 127 + 2**-10,
    "Q5_1": 1 / 31 + 2**-9,
    "Q5_0": 1 / 16 + 2**-9,
    "Q4_1": 1 / 15 + 2**-9,
    "Q4_0": 1 / 8 + 2**-9,
}
# float16's smallest step, below which nothing is told apart.
_TINY = 2.0**-24


def export_gguf(
    checkpoint_dir: Path,
    adapter_dir: Path,
    output_dir: Path,
    *,
    gguf_type: GgufType,
    device: str,
    longest_tokens: int | None = None,
    figures: Mapping[str, Any] | None = None,
) -> int:
    """Writes the files.

    Args:
        checkpoint_dir: Base model.
        adapter_dir: Trained adapter.
        output_dir: An existing folder.
        gguf_type: How the language model's matrices are stored.
        device: ``cpu`` or ``cuda``, where weights are merged.
        longest_tokens: Longest conversation that the model is meant for, where that is known.
        figures: Content of ``figures.json`` for the card, if wanted.

    Returns:
        Number of merged modules; after full fine-tuning, of trained tensors.

    Raises:
        ExportError: llama.cpp does not run such a model, adapter and checkpoint do not fit together, or what was written
            is not what was trained.
    """
    merged = MergedModel(checkpoint_dir, adapter_dir, device)
    processing = Processing.from_dir(merged.processor_dir)
    names = merged.names()
    design = gguf_design(merged.family, merged.bare, names, processing)
    vision_type = "bf16" if gguf_type == "bf16" else "f16"
    paths: dict[File, Path] = {
        "language": output_dir / f"model-{gguf_type}.gguf",
        "vision": output_dir / f"mmproj-{vision_type}.gguf",
    }
    title = merged.description["source"]
    writers = {}
    try:
        for file, values in design.heads.items():
            stored_as = gguf_type if file == "language" else vision_type
            head = {"general.name": title, "general.file_type": _FILE_TYPES[stored_as], **values}
            tensors = in_order(names, design.tensors, file)
            writers[file] = _Writer(paths[file], design.architectures[file], head, tensors, stored_as)
        for group in merged.groups():
            for name, tensor in group.tensors.items():
                for destination in design.tensors[name]:
                    writers[destination.file].write(destination, destination.convert(tensor))
    finally:
        for writer in writers.values():
            writer.close()
    _check(merged, design.tensors, paths, {"language": gguf_type, "vision": vision_type})
    text = modelfile(processing, paths["language"].name, paths["vision"].name, longest_tokens)
    (output_dir / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
    merged.write_card(output_dir, "gguf", figures)
    smallest, largest = image_token_limits(design.heads["vision"], processing)
    with (output_dir / "README.md").open("a", encoding="utf-8", newline="\n") as card:
        card.write(
            f"\nllama.cpp resizes images within limits of its own; `--image-min-tokens {smallest} --image-max-tokens"
            f" {largest}` gives it those of the model's processor.\n"
        )
    return merged.num_trained


class _Writer:
    """One file: its head and all tensors' names and sizes first, then the tensors in the same order."""

    def __init__(
        self, path: Path, architecture: str, head: Mapping[str, Any], tensors: Sequence[Destination], stored_as: str
    ) -> None:
        import gguf
        import numpy as np

        self._stored_as = stored_as
        self._writer = gguf.GGUFWriter(path, architecture)
        self._writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in head.items():
            self._add(key, value)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor_type(tensor, stored_as)]
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind) if kind.name[:1] in "QB" else tensor.shape
            dtype: Any = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            self._writer.add_tensor_info(tensor.name, shape, np.dtype(dtype), size, raw_dtype=kind)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()

    def _add(self, key: str, value: Any) -> None:
        if isinstance(value, bool):
            self._writer.add_bool(key, value)
        elif isinstance(value, int):
            self._writer.add_uint32(key, value)
        elif isinstance(value, float):
            self._writer.add_float32(key, value)
        elif isinstance(value, str):
            self._writer.add_string(key, value)
        else:
            self._writer.add_array(key, value)

    def write(self, destination: Destination, tensor: torch.Tensor) -> None:
        """Appends the next tensor.

        Args:
            destination: The next of those that the file was opened with.
            tensor: Its content, converted.
        """
        import gguf

        kind = gguf.GGMLQuantizationType[tensor_type(destination, self._stored_as)]
        values = tensor.float().cpu().contiguous()
        if not bool(torch.isfinite(values).all()) or (
            kind.name not in ("F32", "BF16") and float(values.abs().max()) > torch.finfo(torch.float16).max
        ):
            raise ExportError(
                f"{destination.source!r} has values up to {float(values.abs().max()):.3g}, which {kind.name} cannot hold; set"
                " export.gguf_type to 'bf16'"
            )
        self._writer.write_tensor_data(gguf.quants.quantize(values.numpy(), kind))

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def tensor_type(destination: Destination, stored_as: str) -> str:
    """Name of the format of one tensor, among GGUF's.

    Vectors are float32, which llama.cpp computes them in. Embeddings and head suffer most from few bits and get eight.
    Rows that no block of 32 divides stay in 16 bit, and convolutions have no bfloat16.

    Args:
        destination: The tensor.
        stored_as: Type of the file.
    """
    if len(destination.shape) < 2:
        return "F32"
    if len(destination.shape) > 2 or "patch_merger" in destination.name:
        return "F16" if stored_as == "f16" else "F32"
    if stored_as.startswith("q") and destination.shape[-1] % _BLOCK:
        return "F16"
    if stored_as[:2] in ("q4", "q5") and destination.name in ("token_embd.weight", "output.weight"):
        return "Q8_0"
    return stored_as.upper()


def _check(
    merged: MergedModel,
    found: Mapping[str, list[Destination]],
    paths: Mapping[File, Path],
    stored_as: Mapping[File, str],
) -> None:
    """Reads both files back and compares names, shapes and values with the weights, merged once more."""
    import gguf

    tensors = {file: {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for file, path in paths.items()}
    for file, of_file in tensors.items():
        expected = {d.name for several in found.values() for d in several if d.file == file}
        if differing := sorted(expected ^ set(of_file)):
            raise ExportError(
                f"{paths[file].name} and its architecture differ in {len(differing)} tensors, first {differing[0]!r}; please"
                " report this with the model's name"
            )
    for group in merged.groups():
        for name, source in group.tensors.items():
            for destination in found[name]:
                stored = tensors[destination.file][destination.name]
                kind = tensor_type(destination, stored_as[destination.file])
                shape = tuple(int(size) for size in reversed(stored.shape))
                if shape != destination.shape or stored.tensor_type.name != kind:
                    raise ExportError(
                        f"{destination.name!r} was stored as {stored.tensor_type.name} of shape {list(shape)}, not {kind} of"
                        f" shape {list(destination.shape)}; please report this with the version of gguf"
                    )
                values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
                _check_values(destination, values.view(shape), destination.convert(source).float().cpu(), kind)


def _check_values(destination: Destination, values: torch.Tensor, expected: torch.Tensor, kind: str) -> None:
    if kind.startswith("Q"):
        largest = expected.unflatten(-1, (-1, _BLOCK)).abs().amax(dim=-1, keepdim=True)
        largest = largest.expand(*largest.shape[:-1], _BLOCK).flatten(-2)
    else:
        largest = expected.abs()
    excess = float(((values - expected).abs() - _BOUNDS[kind] * largest - (_TINY if kind != "F32" else 0)).max())
    if not excess <= 0:
        raise ExportError(
            f"{destination.name!r} is {excess:.3g} further from the merged weight than {kind} can be; please report this with"
            " the version of gguf"
        )
