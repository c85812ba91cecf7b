"""A checkpoint with what was trained folded into its weights, one group of weights at a time.

LoRA adds ``s · B A`` to a weight ``W``; DoRA (arXiv:2402.09353) then gives every output row the trained norm ``m``:

    LoRA   W' = W + s B A
    DoRA   W' = m · (W + s B A) / ‖W + s B A‖   (per row)

``W`` is what training saw: the dequantised weight, not the original 16-bit one, which differs from it. Everything is
computed in float32. Beside each merged weight goes the image of a probe vector under it, computed apart, through the
adapter's two factors; whoever writes the weight compares what lies on disk with that. Loads torch and transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vlm import progress
from vlm.errors import ExportError
from vlm.export.adapter import copy_files
from vlm.export.card import model_card
from vlm.export.factors import LoraFactors, read_adapter
from vlm.export.stored_weights import StoredWeights, stored_config, stored_names, stored_scales
from vlm.lora.full import full_parts
from vlm.lora.peft_model import TARGETS_FILE, WEIGHTS_FILE


@dataclass(frozen=True)
class MergedGroup:
    """Weights that the Hub's layout keeps together; nearly always one."""

    tensors: dict[str, torch.Tensor]
    """By full name in the live model: float32 where something was merged, else as the checkpoint stores them."""
    images: dict[str, torch.Tensor]
    """For each name of a group in which something was merged, the image of `probe`: the tensor's shape, its last
    dimension 1."""


def probe(length: int, device: str = "cpu") -> torch.Tensor:
    """The seeded vector of unit variance that merged weights are tried on.

    Args:
        length: Number of elements.
        device: Where it is needed.
    """
    return torch.randn(length, generator=torch.Generator().manual_seed(length)).to(device)


class MergedModel:
    """What an export of a whole model is made from.

    Args:
        checkpoint_dir: Base model.
        adapter_dir: What was trained.
        device: ``cpu`` or ``cuda``, where weights are merged.

    Attributes:
        description: Content of ``checkpoint.json``.
        targets: Content of the adapter's ``targets.json``.
        family: Row of the family table.
        config: The base model's ``config.json`` without quantisation, as a whole model of this precision has it.
        bare: The model without storage, to read names and shapes from.
        dtype: Of the model's computation and of its unquantised weights.
        device: As given.
        tied: Whether the head shares its weight with the embeddings, and so is not among the weights.
    """

    def __init__(self, checkpoint_dir: Path, adapter_dir: Path, device: str) -> None:
        from vlm.families import family_by_name
        from vlm.loading.model_config import model_config
        from vlm.loading.quantization import blueprint

        self._checkpoint_dir = checkpoint_dir
        self._model_dir = checkpoint_dir / "model"
        self.description: dict[str, Any] = json.loads((checkpoint_dir / "checkpoint.json").read_text(encoding="utf-8"))
        self.targets: dict[str, Any] = json.loads((adapter_dir / TARGETS_FILE).read_text(encoding="utf-8"))
        self.device = device
        self.dtype: torch.dtype = getattr(torch, self.description["dtype"])
        self.family = family_by_name(self.description["family"])
        self.config = stored_config(self._model_dir)
        self.bare = blueprint(self.family, model_config(self._model_dir, self.family))
        self._is_full = bool(full_parts(adapter_dir))
        self._factors: dict[str, LoraFactors] = {}
        if self._is_full:
            self._whole = load_file(adapter_dir / WEIGHTS_FILE)
        else:
            self._factors, self._whole = read_adapter(adapter_dir, self.targets["targets"])
        # In full fine-tuning, tied weights are trained as the one weight that they are.
        self._untied = {} if self._is_full else self._untied_names()
        self.tied = bool(self.config.get("tie_word_embeddings")) and not self._untied
        if self._untied:
            for section in (self.config, self.config.get("text_config") or {}):
                if "tie_word_embeddings" in section or section is self.config:
                    section["tie_word_embeddings"] = False
        self.config["dtype"] = self.description["dtype"]

    @property
    def num_trained(self) -> int:
        """Number of merged modules; after full fine-tuning, of trained tensors."""
        return len(self._whole) if self._is_full else len(self._factors)

    @cached_property
    def head_name(self) -> str:
        """Full name of the language-model head's weight."""
        return self._name_of(self.bare.get_output_embeddings())

    def names(self) -> list[str]:
        """Full names of all weights, in the order of `groups`."""
        return [name for group in self._layout_groups() for name in group]

    def _layout_groups(self) -> list[tuple[str, ...]]:
        from vlm.loading.stored_names import hub_groups

        tied = {self.head_name} if self.tied else set()
        return [group for group in hub_groups(self.bare) if not set(group) <= tied]

    def groups(self) -> Iterator[MergedGroup]:
        """All weights, merged.

        Yields:
            Groups in the model's order. The last one is given only when everything that was trained has found its place.

        Raises:
            ExportError: The adapter and the checkpoint do not fit together, or a merge went wrong.
        """
        from vlm.loading.stored_names import hub_groups

        key_of = stored_names(self.bare)
        merged: set[str] = set()
        replaced: set[str] = set()
        weights = StoredWeights(self._model_dir, self.device, stored_scales(self.bare))
        keys = set(weights.keys())
        unknown = sorted(keys - set(key_of.values()))
        if unknown:
            raise ExportError(
                f"the checkpoint stores {unknown[0]!r} ({len(unknown)} such keys), for which the model has no parameter;"
                " load the model again with the installed transformers"
            )
        source_of = {name: name for name, key in key_of.items() if key in keys}
        for name, others in self._untied.items():
            # Were tied to this weight; one of them has been trained, so all are written.
            source_of.update(dict.fromkeys(others, name))
        groups = [group for group in hub_groups(self.bare) if any(name in source_of for name in group)]
        placed = {name for group in groups for name in group}
        missing = sorted(
            {name for name in self._factors if not {name, f"{name}.weight"} & placed} | (set(self._whole) - placed)
        )
        if missing:
            raise ExportError(
                f"{len(self._factors) - len(set(missing) & set(self._factors))} of {len(self._factors)} adapted modules were merged;"
                f" {missing[0]!r} has no weight in the checkpoint. Export with the base model that the adapter was"
                " trained on"
            )
        for group in progress.track(groups, "merging", len(groups), "weight"):
            tensors = {}
            for name in group:
                if name in self._whole:
                    replaced.add(name)
                    tensors[name] = self._whole[name]
                else:
                    tensors[name] = weights.read(key_of[source_of[name]])
            images = self._merge(tensors)
            merged.update(_target_of(name) for name in group if _target_of(name) in self._factors)
            yield MergedGroup(tensors, images)
        assert merged == set(self._factors)
        assert replaced == set(self._whole)

    def write_surroundings(
        self,
        output_dir: Path,
        kind: str,
        *,
        quantization: Mapping[str, Any] | None = None,
        figures: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes everything of an export that transformers loads but its weights.

        Args:
            output_dir: An existing folder.
            kind: Type of the export, for the card.
            quantization: The section of ``config.json`` that says how the weights are quantised.
            figures: Content of ``figures.json`` for the card, if wanted.
        """
        config = dict(self.config)
        if quantization is not None:
            config["quantization_config"] = dict(quantization)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (output_dir / "config.json").write_text(text, encoding="utf-8", newline="\n")
        generation = self._model_dir / "generation_config.json"
        if generation.is_file():
            (output_dir / "generation_config.json").write_bytes(generation.read_bytes())
        copy_files(self.processor_dir, output_dir)
        self.write_card(output_dir, kind, figures)

    @property
    def processor_dir(self) -> Path:
        """Folder of the model's processor."""
        return self._checkpoint_dir / "processor"

    def write_card(self, output_dir: Path, kind: str, figures: Mapping[str, Any] | None = None) -> None:
        """Writes ``README.md``.

        Args:
            output_dir: An existing folder.
            kind: Type of the export.
            figures: Content of ``figures.json``, if wanted.
        """
        card = model_card(kind, self.description, self.targets, figures)
        (output_dir / "README.md").write_text(card, encoding="utf-8", newline="\n")

    def _merge(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Merges in place; the images, or none where nothing is to be merged."""
        adapted = {name: self._factors[target] for name in tensors if (target := _target_of(name)) in self._factors}
        if not adapted:
            return {}
        images = {}
        for name, tensor in tensors.items():
            weight = tensor.to(self.device, torch.float32)
            x = probe(weight.shape[-1], self.device)
            if name in adapted:
                image = adapted[name].apply(weight, x)
                tensors[name] = adapted[name].merge(weight)
            else:
                image = weight @ x
            images[name] = image[..., None]
        return images

    def _untied_names(self) -> dict[str, tuple[str, ...]]:
        """Head by embedding, where they were tied and one of them was trained by itself."""
        if not self.config.get("tie_word_embeddings"):
            return {}
        embedding = self._name_of(self.bare.get_input_embeddings())
        trained = self.head_name in self._whole or embedding in self._whole
        return {embedding: (self.head_name,)} if trained else {}

    def _name_of(self, wanted: Any) -> str:
        return next(f"{name}.weight" for name, module in self.bare.named_modules() if module is wanted)


def _target_of(name: str) -> str:
    """The adapted module or expert parameter that a weight would belong to."""
    return name.removesuffix(".weight")


def check_keys(placed: Mapping[str, Path], expected: set[str]) -> None:
    """Compares the keys that were written with those that the architecture has.

    Args:
        placed: The file of each key.
        expected: All keys of the architecture.

    Raises:
        ExportError: They differ.
    """
    differing = sorted(expected ^ set(placed))
    if differing:
        raise ExportError(
            f"the merged model and its architecture differ in {len(differing)} weights, first {differing[0]!r};"
            " load the model again with the installed transformers"
        )
