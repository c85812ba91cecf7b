"""Export ``merged_16bit``: the base model with the adapter folded into its weights, weight by weight.

LoRA adds ``s · B A`` to a weight ``W``; DoRA (arXiv:2402.09353) then gives every output row the trained norm ``m``:

    LoRA   W' = W + s B A
    DoRA   W' = m · (W + s B A) / ‖W + s B A‖   (per row)

``W`` is what training saw: the dequantised weight, not the original 16-bit one, which differs from it. Everything is
computed in float32 and rounded once. After writing, every merged weight is read back and applied to a probe vector,
whose image was computed apart, through the adapter's two factors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vlm import progress
from vlm.errors import ExportError
from vlm.export.adapter import copy_files
from vlm.export.card import model_card
from vlm.export.shards import ShardWriter
from vlm.export.stored_weights import StoredWeights, stored_config, stored_names
from vlm.lora.full import full_parts
from vlm.lora.peft_model import TARGETS_FILE, WEIGHTS_FILE, read_config

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraFactors:
    """One module's update."""

    a: torch.Tensor
    """Tensor of shape [rank, inputs], float32."""
    b: torch.Tensor
    """Tensor of shape [outputs, rank], float32."""
    scale: float
    """``s``."""
    magnitude: torch.Tensor | None
    """DoRA's ``m``, tensor of shape [outputs], or None."""

    def merge(self, weight: torch.Tensor) -> torch.Tensor:
        """Folds the update into a weight.

        Args:
            weight: Tensor of shape [outputs, inputs], float32.
        """
        a, b = self.a.to(weight.device), self.b.to(weight.device)
        merged = weight + self.scale * (b @ a)
        if self.magnitude is not None:
            merged *= (self.magnitude.to(weight.device) / merged.norm(dim=1))[:, None]
        return merged

    def apply(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The adapted layer's output without its bias, the way the live adapter computes it.

        Args:
            weight: Tensor of shape [outputs, inputs], float32.
            x: Tensor of shape [inputs].
        """
        a, b = self.a.to(weight.device), self.b.to(weight.device)
        y = weight @ x + self.scale * (b @ (a @ x))
        if self.magnitude is not None:
            # ‖W + s B A‖² per row, without the merged matrix: ‖W‖² + 2 s W·(B A) + s² ‖B A‖².
            cross = ((weight @ a.T) * b).sum(dim=1)
            update = ((b @ (a @ a.T)) * b).sum(dim=1)
            norms = (weight.square().sum(dim=1) + 2 * self.scale * cross + self.scale**2 * update).sqrt()
            y = y * self.magnitude.to(weight.device) / norms
        return y


def export_merged_16bit(
    checkpoint_dir: Path,
    adapter_dir: Path,
    output_dir: Path,
    *,
    max_shard_size_mb: int,
    device: str,
    metrics: Mapping[str, Any] | None = None,
) -> int:
    """Writes a whole model that plain transformers loads.

    Args:
        checkpoint_dir: Base model.
        adapter_dir: Trained adapter.
        output_dir: An existing folder.
        max_shard_size_mb: Largest weights file, in 10^6 bytes.
        device: ``cpu`` or ``cuda``, where weights are merged.
        metrics: Content of ``metrics.json`` for the card, if wanted.

    Returns:
        Number of merged modules; after full fine-tuning, of trained tensors.

    Raises:
        ExportError: Adapter and checkpoint do not fit together, or what was written is not what was trained.
    """
    from transformers import AutoConfig

    from vlm.families import family_by_name
    from vlm.loading.quantization import blueprint

    description = json.loads((checkpoint_dir / "checkpoint.json").read_text(encoding="utf-8"))
    targets = json.loads((adapter_dir / TARGETS_FILE).read_text(encoding="utf-8"))
    dtype = getattr(torch, description["dtype"])
    model_dir = checkpoint_dir / "model"
    config = stored_config(model_dir)
    bare = blueprint(
        family_by_name(description["family"]), AutoConfig.from_pretrained(model_dir, local_files_only=True)
    )
    key_of = stored_names(bare)
    name_of = {key: name for name, key in key_of.items()}
    is_full = bool(full_parts(adapter_dir))
    factors, whole = ({}, load_file(adapter_dir / WEIGHTS_FILE)) if is_full else read_adapter(adapter_dir)
    # In full fine-tuning, tied weights are trained as the one weight that they are.
    untied = {} if is_full else _untied_names(bare, config, whole)

    writer = ShardWriter(output_dir, max_shard_size_mb * 1_000_000)
    merged: dict[str, torch.Tensor] = {}
    replaced = set()
    with StoredWeights(model_dir, device) as weights:
        keys = list(weights.keys())
        unknown = sorted(set(keys) - set(name_of))
        if unknown:
            raise ExportError(
                f"the checkpoint stores {unknown[0]!r} ({len(unknown)} such keys), for which the model has no parameter;"
                " load the model again with the installed transformers"
            )
        for key in progress.track(keys, "merging", len(keys), "weight"):
            name = name_of[key]
            module = name.removesuffix(".weight")
            if name in whole:
                tensor = whole[name]
                replaced.add(name)
            else:
                tensor = weights.read(key)
            for other in untied.get(name, ()):
                # Was tied to this weight; one of the two has been trained, so both are written.
                writer.add(key_of[other], (whole[other] if other in whole else weights.read(key)).to(dtype))
                replaced.update({other} & set(whole))
            if module in factors and name == f"{module}.weight":
                weight = tensor.to(torch.float32)
                merged[key] = factors[module].apply(weight, _probe(key, weight.shape[1], device)).cpu()
                tensor = factors[module].merge(weight)
            writer.add(key, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    missing = sorted(
        (set(factors) - {name_of[key].removesuffix(".weight") for key in merged}) | (set(whole) - replaced)
    )
    if missing:
        raise ExportError(
            f"{len(merged)} of {len(factors)} adapted modules were merged; {missing[0]!r} has no weight in the checkpoint."
            " Export with the base model that the adapter was trained on"
        )
    placed = writer.finish()
    _check_keys(placed, bare, key_of, tied=bool(config.get("tie_word_embeddings")) and not untied)
    _check_merged(placed, merged, dtype)

    if untied:
        for section in (config, config.get("text_config") or {}):
            if "tie_word_embeddings" in section or section is config:
                section["tie_word_embeddings"] = False
    config["dtype"] = description["dtype"]
    (output_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if (model_dir / "generation_config.json").is_file():
        generation = (model_dir / "generation_config.json").read_bytes()
        (output_dir / "generation_config.json").write_bytes(generation)
    copy_files(checkpoint_dir / "processor", output_dir)
    card = model_card("merged_16bit", description, targets, metrics)
    (output_dir / "README.md").write_text(card, encoding="utf-8", newline="\n")
    return len(replaced) if is_full else len(merged)


def read_adapter(adapter_dir: Path) -> tuple[dict[str, LoraFactors], dict[str, torch.Tensor]]:
    """Reads an adapter.

    Args:
        adapter_dir: Its folder.

    Returns:
        Updates by full module name, and whole tensors by full parameter name.

    Raises:
        ExportError: The adapter uses a variant of LoRA that cannot be merged here.
    """
    config = read_config(adapter_dir)
    unsupported = [name for name in ("alpha_pattern", "fan_in_fan_out", "lora_bias") if getattr(config, name)]
    if unsupported or config.bias != "none":
        raise ExportError(
            f"the adapter uses {(unsupported or ['bias'])[0]}, which merging does not know; export it as 'lora' instead"
        )
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in load_file(adapter_dir / WEIGHTS_FILE).items()}
    factors = {}
    for key in sorted(tensors):
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight")
        a, b = tensors[key].float(), tensors[f"{name}.lora_B.weight"].float()
        magnitude = tensors.get(f"{name}.lora_magnitude_vector")
        rank = a.shape[0]
        scale = config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)
        factors[name] = LoraFactors(a, b, scale, None if magnitude is None else magnitude.float())
    return factors, {key: tensor for key, tensor in tensors.items() if ".lora_" not in key}


def _untied_names(model: Any, config: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Head by embedding, where they were tied and one of them was trained by itself."""
    if not config.get("tie_word_embeddings"):
        return {}
    modules = {id(module): name for name, module in model.named_modules()}
    embedding = f"{modules[id(model.get_input_embeddings())]}.weight"
    head = f"{modules[id(model.get_output_embeddings())]}.weight"
    return {embedding: (head,)} if head in whole or embedding in whole else {}


def _probe(key: str, length: int, device: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return torch.randn(length, generator=torch.Generator().manual_seed(seed)).to(device)


def _check_keys(placed: Mapping[str, Path], model: Any, key_of: Mapping[str, str], *, tied: bool) -> None:
    expected = set(key_of.values())
    if tied:
        modules = {id(module): name for name, module in model.named_modules()}
        expected -= {key_of[f"{modules[id(model.get_output_embeddings())]}.weight"]}
    differing = sorted(expected ^ set(placed))
    if differing:
        raise ExportError(
            f"the merged model and its architecture differ in {len(differing)} weights, first {differing[0]!r};"
            " load the model again with the installed transformers"
        )


def _check_merged(placed: Mapping[str, Path], images: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Reads every merged weight back and compares its image of the probe with the adapter's."""
    for key, expected in images.items():
        with safe_open(placed[key], framework="pt") as file:
            weight = file.get_tensor(key).float()
        found = weight @ _probe(key, weight.shape[1], "cpu")
        # Rounding errors of single weights are independent, so they add up like a random walk over the row: about
        # eps · ‖row‖ for a probe of unit variance. Ten times that, and float32's own summation error, is no rounding.
        allowed = 10 * (torch.finfo(dtype).eps + 1e-5) * weight.norm(dim=1).max()
        worst = float((found - expected).abs().max())
        if not worst <= float(allowed):
            raise ExportError(
                f"the merged weight {key!r} gives outputs that are {worst:.3g} away from the adapter's (allowed {float(allowed):.3g});"
                " please report this with the model's name"
            )
