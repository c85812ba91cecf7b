"""Step 2: the seeded initial adapter and the list of what it adapts.

The initial weights depend on the seed, the module's name and its width only: not on the device, nor on which other
modules are adapted. Loads torch and peft.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm.config import LoraConfig
from vlm.lora.file_keys import target_keys
from vlm.lora.full import describe_full
from vlm.lora.peft_model import TARGETS_FILE, WEIGHTS_FILE, adapter_parameters, save_tensors, unwrap, wrap, write_config
from vlm.lora.targets import Selection, select
from vlm.summary import Summary

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig

    from vlm.loading.checkpoint import LoadedModel


@dataclass(frozen=True)
class AdapterSummary(Summary):
    """The head of ``targets.json``."""

    num_targets: int
    """Adapted modules and expert parameters; in full fine-tuning, trained tensors."""
    num_targets_by_part: dict[str, int]
    """The same by part of the model."""
    num_trainable_parameters: int
    """Parameters that learn."""
    num_base_parameters: int
    """Parameters of the model, as if unquantised."""
    base_name: str
    """Name of the base model."""
    base_digest: str | None
    """Digest of the base checkpoint, where known."""


def build_adapter(loaded: LoadedModel, lora: LoraConfig, output_dir: Path) -> AdapterSummary:
    """Writes the initial adapter: its weights, its configuration and ``targets.json``.

    For full fine-tuning, ``targets.json`` alone: the weights are the base's. The base's digest, where known, goes on
    record, so that the adapter refuses another one.

    Args:
        loaded: The base model; as before when this returns.
        lora: Which layers learn, and how.
        output_dir: Receives the files; made if it is not there.

    Returns:
        Counts.

    Raises:
        LoraError: A name matches nothing, or a module cannot be trained.
    """
    checkpoint = json.loads((loaded.checkpoint_dir / "checkpoint.json").read_text(encoding="utf-8"))
    output_dir.mkdir(parents=True, exist_ok=True)
    base = {
        "num_base_parameters": checkpoint["num_parameters"],
        "base_name": checkpoint["source"],
        "base_digest": loaded.digest,
    }
    if lora.full_finetuning:
        summary = AdapterSummary(**describe_full(loaded, lora), **base)
        _write_targets(output_dir, summary, full_finetuning=sorted(lora.full_finetuning))
        return summary
    selection = select(loaded.model, loaded.family, lora)
    config = peft_config(selection, lora, checkpoint["source"])
    peft_model = wrap(loaded.model, config)
    try:
        initialize(peft_model, lora.seed)
        num_trainable = sum(parameter.numel() for parameter in set(adapter_parameters(peft_model).values()))
        keys = target_keys(peft_model, selection.targets)
        save_tensors(peft_model, output_dir / WEIGHTS_FILE)
        write_config(config, output_dir)
    finally:
        unwrap(peft_model)
    summary = AdapterSummary(
        num_targets=len(selection.targets),
        num_targets_by_part=dict(
            sorted(Counter(loaded.family.part_of(name) or "other" for name in selection.targets).items())
        ),
        num_trainable_parameters=num_trainable,
        **base,
    )
    _write_targets(
        output_dir,
        summary,
        targets=[{"name": name, "rank": selection.ranks[name], **keys.get(name, {})} for name in selection.targets],
        modules_to_save=list(selection.modules_to_save),
        seed=lora.seed,
    )
    return summary


def _write_targets(output_dir: Path, summary: AdapterSummary, **content: Any) -> None:
    lists: dict[str, list[Any]] = {"targets": [], "modules_to_save": []}
    text = json.dumps({**summary.to_json(), **lists, **content}, indent=2, sort_keys=True) + "\n"
    (output_dir / TARGETS_FILE).write_text(text, encoding="utf-8", newline="\n")


def peft_config(selection: Selection, lora: LoraConfig, base_name: str) -> PeftLoraConfig:
    """Peft's configuration of an adapter, with exact names only.

    Args:
        selection: The chosen modules.
        lora: Rank, scale and variants.
        base_name: Goes on record as the base model; a name, never a path of this machine.
    """
    import peft

    modules = [name for name in selection.targets if name not in selection.parameters]
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        # peft takes an empty list for "use your defaults" unless there are parameters; a pattern that matches nothing
        # says "none".
        target_modules=modules if modules or selection.parameters else r"(?!)",
        target_parameters=list(selection.parameters) or None,
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number works; only the hint says int
        lora_dropout=lora.dropout,
        rank_pattern={re.escape(name): rank for name, rank in selection.ranks.items() if rank != lora.rank},
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(selection.modules_to_save) or None,
    )


def initialize(peft_model: Any, seed: int) -> None:
    """Sets every A matrix to seeded uniform noise of variance ``1 / (3 · inputs)`` (peft's default law); B stays 0.

    Args:
        peft_model: A model with a fresh adapter.
        seed: Of the weights.
    """
    with torch.no_grad():
        for key, parameter in adapter_parameters(peft_model).items():
            if not key.endswith(".lora_A.weight"):
                continue
            digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            bound = 1 / math.sqrt(parameter.shape[1])
            noise = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            parameter.copy_(noise)
