"""Export ``merged_16bit``: the base model with the adapter folded into its weights, in the layout of the Hub.

LoRA adds ``s · B A`` to a weight ``W``; DoRA (arXiv:2402.09353) then gives every output row the trained norm ``m``:

    LoRA   W' = W + s B A
    DoRA   W' = m · (W + s B A) / ‖W + s B A‖   (per row)

``W`` is what training saw: the dequantised weight, not the original 16-bit one, which differs from it. Everything is
computed in float32 and rounded once. Weights go through one by one, or in groups where the Hub stores some as one. After
writing, every merged weight is read back and applied to a probe vector, whose image was computed apart, through the
adapter's two factors; where the Hub's layout joins or cuts weights, it joins or cuts their images in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vlm import progress
from vlm.errors import ExportError
from vlm.export.adapter import copy_files
from vlm.export.card import model_card
from vlm.export.factors import LoraFactors, read_adapter
from vlm.export.shards import ShardWriter
from vlm.export.stored_weights import StoredWeights, stored_config, stored_names, stored_scales
from vlm.lora.full import full_parts
from vlm.lora.peft_model import TARGETS_FILE, WEIGHTS_FILE


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
    from vlm.families import family_by_name
    from vlm.loading.model_config import model_config
    from vlm.loading.quantization import blueprint
    from vlm.loading.stored_names import hub_groups, to_hub_layout

    description = json.loads((checkpoint_dir / "checkpoint.json").read_text(encoding="utf-8"))
    targets = json.loads((adapter_dir / TARGETS_FILE).read_text(encoding="utf-8"))
    dtype = getattr(torch, description["dtype"])
    model_dir = checkpoint_dir / "model"
    config = stored_config(model_dir)
    family = family_by_name(description["family"])
    bare = blueprint(family, model_config(model_dir, family))
    key_of = stored_names(bare)
    is_full = bool(full_parts(adapter_dir))
    factors: dict[str, LoraFactors] = {}
    if is_full:
        whole = load_file(adapter_dir / WEIGHTS_FILE)
    else:
        factors, whole = read_adapter(adapter_dir, targets["targets"])
    # In full fine-tuning, tied weights are trained as the one weight that they are.
    untied = {} if is_full else _untied_names(bare, config, whole)

    writer = ShardWriter(output_dir, max_shard_size_mb * 1_000_000)
    images: dict[str, torch.Tensor] = {}
    merged: set[str] = set()
    replaced: set[str] = set()
    with StoredWeights(model_dir, device, stored_scales(bare)) as weights:
        keys = set(weights.keys())
        unknown = sorted(keys - set(key_of.values()))
        if unknown:
            raise ExportError(
                f"the checkpoint stores {unknown[0]!r} ({len(unknown)} such keys), for which the model has no parameter;"
                " load the model again with the installed transformers"
            )
        source_of = {name: name for name, key in key_of.items() if key in keys}
        for name, others in untied.items():
            # Were tied to this weight; one of them has been trained, so all are written.
            source_of.update(dict.fromkeys(others, name))
        groups = [group for group in hub_groups(bare) if any(name in source_of for name in group)]
        for group in progress.track(groups, "merging", len(groups), "weight"):
            tensors = {}
            for name in group:
                if name in whole:
                    replaced.add(name)
                tensors[name] = whole[name] if name in whole else weights.read(key_of[source_of[name]])
            adapted = {name: factors[target] for name in group if (target := _target_of(name)) in factors}
            if adapted:
                merged.update(_target_of(name) for name in adapted)
                live = {}
                for name, tensor in tensors.items():
                    weight = tensor.to(device, torch.float32)
                    probe = _probe(weight.shape[-1], device)
                    live[name] = (adapted[name].apply(weight, probe) if name in adapted else weight @ probe)[..., None]
                    if name in adapted:
                        tensors[name] = adapted[name].merge(weight)
                # Layouts only cut and join outputs, so the images of a probe follow them.
                images.update({key: image.cpu() for key, image in to_hub_layout(bare, live).items()})
            for key, tensor in to_hub_layout(bare, tensors).items():
                writer.add(key, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    missing = sorted((set(factors) - merged) | (set(whole) - replaced))
    if missing:
        raise ExportError(
            f"{len(merged)} of {len(factors)} adapted modules were merged; {missing[0]!r} has no weight in the checkpoint."
            " Export with the base model that the adapter was trained on"
        )
    placed = writer.finish()
    _check_keys(placed, bare, tied=bool(config.get("tie_word_embeddings")) and not untied)
    _check_merged(placed, images, dtype)

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


def _target_of(name: str) -> str:
    """The adapted module or expert parameter that a weight would belong to."""
    return name.removesuffix(".weight")


def _untied_names(model: Any, config: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Head by embedding, where they were tied and one of them was trained by itself."""
    if not config.get("tie_word_embeddings"):
        return {}
    modules = {id(module): name for name, module in model.named_modules()}
    embedding = f"{modules[id(model.get_input_embeddings())]}.weight"
    head = f"{modules[id(model.get_output_embeddings())]}.weight"
    return {embedding: (head,)} if head in whole or embedding in whole else {}


def _probe(length: int, device: str) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(length)).to(device)


def _check_keys(placed: Mapping[str, Path], model: Any, *, tied: bool) -> None:
    from vlm.loading.stored_names import to_hub_layout

    expected = set(to_hub_layout(model, model.state_dict()))
    if tied:
        modules = {id(module): name for name, module in model.named_modules()}
        head = f"{modules[id(model.get_output_embeddings())]}.weight"
        expected -= set(to_hub_layout(model, {head: model.state_dict()[head]}))
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
        found = weight @ _probe(weight.shape[-1], "cpu")
        # Rounding errors of single weights are independent, so they add up like a random walk over the row: about
        # eps · ‖row‖ for a probe of unit variance. Ten times that, and float32's own summation error, is no rounding.
        allowed = 10 * (torch.finfo(dtype).eps + 1e-5) * weight.norm(dim=-1).max()
        # Some versions of transformers drop the images' last dimension, which is 1, when they cut experts apart.
        worst = float((found - expected.reshape(found.shape)).abs().max())
        if not worst <= float(allowed):
            raise ExportError(
                f"the merged weight {key!r} gives outputs that are {worst:.3g} away from the adapter's (allowed {float(allowed):.3g});"
                " please report this with the model's name"
            )
