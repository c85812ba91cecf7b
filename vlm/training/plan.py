"""Step 4: which rows go into which micro-batch of which step, decided before any model is loaded.

The trainer just follows the plan, so an interrupted training goes on at exactly the row where it stopped. How rows are
put together is in `vlm.training.steps`; here they meet the memory of the device.

Files: ``plan.json`` (facts), ``batches.arrow`` (one row per micro-batch: its step and row numbers).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm.config import TrainingConfig
from vlm.errors import ConfigError, DataError
from vlm.families import Family, family_by_name
from vlm.summary import Summary
from vlm.training.activation import ActivationPlan, choose_activations
from vlm.training.device import check_device
from vlm.training.fit import check_fits
from vlm.training.memory import NF4_BYTES, MemoryEstimate, estimate_memory, kept_of_spread, towers
from vlm.training.rates import check_rates
from vlm.training.steps import PackLimits, full_pack_size, plan_batches, plan_full_packs, plan_packs

PLAN_FILE = "plan.json"
BATCHES_FILE = "batches.arrow"
# What the driver and the libraries take before the first tensor.
CUDA_CONTEXT_BYTES = 700_000_000
# The share of the device that packs are made for; the estimate may err, and memory gets fragmented.
_USED_SHARE = 0.9
# A pack of so many tokens keeps a GPU busy: several smaller packs cost less than recomputing layers of one large one.
_EFFICIENT_PACK_TOKENS = 4096
# On a CPU a pack of so many tokens keeps a few cores busy.
CPU_PACK_TOKENS = 1024
# One more than a size that CUDA graphs are made for: where padding up to the next one costs most.
_COUNTED_TOKENS = 1025
_SUMS = ("activations_bytes", "expected_bytes", "reserved_bytes", "at_least_bytes")
_VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlanSummary(Summary):
    """The content of ``plan.json``."""

    num_steps: int
    """Optimiser steps."""
    num_micro_batches: int
    """Forward and backward passes."""
    most_micro_batches_per_step: int
    """Micro-batches of the step that has the most."""
    packing: bool
    """Whether micro-batches are packed rows; otherwise they are padded."""
    max_tokens_per_pack: int | None
    """Most tokens of a pack as planned; None where only memory limits it, and without packing."""
    largest_micro_batch_tokens: int
    """Tokens of the largest micro-batch, padding included."""
    fullness: float
    """Tokens of all micro-batches over what they would hold: `max_tokens_per_pack` or the largest one's tokens each."""
    num_train_rows: int
    """Rows in the training split."""
    num_validation_rows: int
    """Rows in the validation split."""
    num_rows_seen: int
    """Rows over the whole training, repetitions counted."""
    num_tokens_seen: int
    """Their tokens, without padding."""
    num_supervised_tokens_seen: int
    """Their tokens in answers."""
    padding_share: float
    """Share of padding in all micro-batches."""
    device: str
    """``cpu`` or ``cuda``."""
    dtype: str
    """Precision of computation."""
    optimizer: str
    """``adamw`` or ``adamw_8bit``, no longer ``auto``."""
    worst_sample: dict[str, Any]
    """The costliest row: `id`, `num_tokens`, `num_visual_tokens`, `image_sizes` as [height, width], for videos [frames, height, width]."""
    activations: dict[str, Any]
    """The fields of an `ActivationPlan`: which layers are recomputed, what lies in the host's memory, and whether there are
    CUDA graphs."""
    memory: dict[str, int]
    """Bytes by part and sums of them, for the costliest micro-batch: the fields and properties of a `MemoryEstimate`."""
    device_memory_bytes: int | None
    """What the device has; None on a CPU."""


def make_plan(
    dataset_dir: Path,
    checkpoint_dir: Path,
    adapter_dir: Path,
    training: TrainingConfig,
    output_dir: Path,
    *,
    device: str,
    dtype: str,
    num_spread: int = 1,
) -> PlanSummary:
    """Plans a training and refuses what cannot fit.

    Args:
        dataset_dir: Prepared dataset.
        checkpoint_dir: Base model; only its configuration and file sizes are read.
        adapter_dir: Initial adapter; only its list of targets is read.
        training: Settings.
        output_dir: Receives both files; made if it is not there.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        num_spread: GPUs that the language model's layers are spread over.

    Returns:
        The content of ``plan.json``.

    Raises:
        DataError: The dataset has no training rows, or no validation rows where the settings need some.
        ConfigError: A learning rate is for a part in which nothing learns, or a row is longer than a pack may be.
        ResourceError: The costliest micro-batch cannot fit into the GPU's memory; names the sample.
    """
    from vlm.data.prepared import PreparedDataset

    rows = PreparedDataset(dataset_dir, "train")
    if not len(rows):
        raise DataError(
            "the dataset has no training rows; lower data.split.validation_fraction and test_fraction, or add sources"
        )
    num_validation_rows = len(PreparedDataset(dataset_dir, "validation"))
    _check_validation(training, num_validation_rows)
    lengths = np.asarray(rows.num_tokens, dtype=np.int64)
    visual = np.asarray(rows.num_visual_tokens, dtype=np.int64)
    check_device(training, device)
    optimizer = resolve_optimizer(training, device)

    config = json.loads((checkpoint_dir / "model" / "config.json").read_text(encoding="utf-8"))
    adapter = json.loads((adapter_dir / "targets.json").read_text(encoding="utf-8"))
    description = json.loads((checkpoint_dir / "checkpoint.json").read_text(encoding="utf-8"))
    family = family_by_name(description["family"])
    trained_parts = _trained_parts(adapter, family)
    check_rates(training, trained_parts)
    weights_bytes = sum(path.stat().st_size for path in (checkpoint_dir / "model").glob("*.safetensors"))
    if adapter.get("full_finetuning"):
        # Those weights make room for their float32 copies, which are counted with the optimiser.
        weights_bytes -= min(weights_bytes, adapter["num_trainable_parameters"] * _VALUE_BYTES[dtype])
    language, vision, _ = towers(config, family)
    num_trainable = adapter["num_trainable_parameters"]
    if num_spread > 1:
        weights_bytes, num_trainable = kept_of_spread(
            language,
            num_spread,
            weights_bytes=weights_bytes,
            num_trainable=num_trainable,
            stored_bytes=NF4_BYTES if "quantization_config" in config else _VALUE_BYTES[dtype],
            trains_layers="language" in adapter.get("full_finetuning", ()),
        )

    def estimate(length_tokens: int, num_visual_tokens: int, activations: ActivationPlan) -> MemoryEstimate:
        return estimate_memory(
            config,
            family,
            weights_bytes=weights_bytes,
            num_trainable=num_trainable,
            trains_vision="vision" in trained_parts,
            length_tokens=length_tokens,
            num_visual_tokens=num_visual_tokens,
            value_bytes=_VALUE_BYTES[dtype],
            activations=activations,
            fused=training.fused_kernels,
            optimizer=optimizer,
            trained_whole=adapter.get("full_finetuning", ()),
            head_learns=_head_learns(adapter),
            is_spread=num_spread > 1,
            patches_per_token=family.patches_per_token(config) if family.patches_per_token else None,
            on_gpu=device == "cuda",
        )

    # Bytes of any row or micro-batch at the two peaks, while the language model runs backward and while the vision tower does:
    # both are linear in the counts of tokens and of visual ones. Of shape [rows, 2].
    def costs(num_tokens: Counts, num_visual: Counts, activations: ActivationPlan) -> Counts:
        text, image = (
            # Whole numbers, whose sums are the same in any order.
            [-(-size // _COUNTED_TOKENS) for size in (bound.language_bytes, bound.vision_bytes)]
            for bound in (estimate(*counts, activations) for counts in ((_COUNTED_TOKENS, 0), (0, _COUNTED_TOKENS)))
        )
        return num_tokens[:, None] * np.array(text) + num_visual[:, None] * np.array(image)

    worst = int(np.argmax(costs(lengths, visual, ActivationPlan(0, 0)).max(1)))
    packing = training.packing and family.packing is not None
    if packing:
        share = max(1.0, min(_EFFICIENT_PACK_TOKENS, _step_tokens(lengths, training)) / lengths[worst])
        largest = int(share * lengths[worst]), int(share * visual[worst])
    else:
        _check_packable(training, family)
        batches, capacity = list(plan_batches(lengths, training)), None
        sizes = np.array([lengths[batch].max() * len(batch) for _, batch in batches])
        visual_of_batch = np.array([visual[batch].sum() for _, batch in batches])
        costliest = int(np.argmax(costs(sizes, visual_of_batch, ActivationPlan(0, 0)).max(1)))
        largest = int(sizes[costliest]), int(visual_of_batch[costliest])
    device_memory = _device_memory_bytes(device)
    usable = None if device_memory is None else device_memory - CUDA_CONTEXT_BYTES
    activations = choose_activations(
        training.activation_memory,
        num_vision_layers=vision.num_layers if "vision" in trained_parts else 0,
        num_language_layers=language.num_layers,
        expected_bytes=lambda plan: estimate(*largest, plan).reserved_bytes,
        device_memory_bytes=usable,
        embedding_can_move=_embedding_can_move(config, adapter),
        # Spread weights have no fixed address.
        graphs=device == "cuda" and training.cuda_graphs and num_spread == 1,
        launch_bound=language.slot_bytes(largest[0], _VALUE_BYTES[dtype]) > 0,
    )
    if packing:
        cost = costs(lengths, visual, activations)
        # The head's chunk is its largest for a row of many tokens.
        fixed = estimate(1 << 20, 0, activations)
        budget = math.inf
        if device_memory is not None:
            taken = fixed.fixed_bytes + estimate(*largest, activations).pool_bytes + CUDA_CONTEXT_BYTES
            budget = max(_USED_SHARE * device_memory - taken, float(cost.max()))
        batches, capacity = _packs(rows, lengths, visual, training, PackLimits(None, cost.astype(np.float64), budget))
        sizes = np.array([lengths[batch].sum() for _, batch in batches])
        visual_of_batch = np.array([visual[batch].sum() for _, batch in batches])
        costliest = int(np.argmax(costs(sizes, visual_of_batch, activations).max(1)))
        largest = int(sizes[costliest]), int(visual_of_batch[costliest])
    peak = estimate(*largest, activations)
    sample = {
        "id": rows[worst].id,
        "num_tokens": int(lengths[worst]),
        "num_visual_tokens": int(visual[worst]),
        "image_sizes": [list(image.shape[:-1]) for image in rows[worst].images],
    }
    if usable is not None:
        check_fits(
            peak,
            usable,
            sample,
            training,
            optimizer=optimizer,
            is_quantized="quantization_config" in config,
            trains_whole=bool(adapter.get("full_finetuning")),
            num_spread=num_spread,
            packed_rows=len(batches[costliest][1]) if packing else None,
        )

    seen = np.concatenate([batch for _, batch in batches])
    summary = PlanSummary(
        num_steps=batches[-1][0] + 1,
        num_micro_batches=len(batches),
        most_micro_batches_per_step=int(np.bincount([step for step, _ in batches]).max()),
        packing=packing,
        max_tokens_per_pack=capacity,
        largest_micro_batch_tokens=int(sizes.max()),
        fullness=round(float(lengths[seen].sum()) / (len(batches) * (capacity or int(sizes.max()))), 6),
        num_train_rows=len(rows),
        num_validation_rows=num_validation_rows,
        num_rows_seen=len(seen),
        num_tokens_seen=int(lengths[seen].sum()),
        num_supervised_tokens_seen=int(np.asarray(rows.num_supervised_tokens)[seen].sum()),
        padding_share=round(1 - float(lengths[seen].sum() / sizes.sum()), 6),
        device=device,
        dtype=dtype,
        optimizer=optimizer,
        worst_sample=sample,
        activations=asdict(activations),
        memory={**asdict(peak), **{name: getattr(peak, name) for name in _SUMS}},
        device_memory_bytes=device_memory,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    _write_batches(batches, output_dir / BATCHES_FILE)
    text = json.dumps(summary.to_json(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (output_dir / PLAN_FILE).write_text(text, encoding="utf-8", newline="\n")
    return summary


def read_plan(plan_dir: Path) -> PlanSummary:
    """Reads ``plan.json``.

    Args:
        plan_dir: The folder of a plan artifact.
    """
    return PlanSummary(**json.loads((plan_dir / PLAN_FILE).read_text(encoding="utf-8")))


def _check_validation(training: TrainingConfig, num_rows: int) -> None:
    if num_rows == 0 and (training.keep_best != "none" or training.generate_every_steps is not None):
        name = "generate_every_steps" if training.keep_best == "none" else "keep_best"
        raise DataError(
            f"training.{name} {getattr(training, name)!r} needs validation rows but the dataset has none; raise"
            " data.split.validation_fraction, or leave the setting out"
        )


def _step_tokens(lengths: npt.NDArray[np.int64], training: TrainingConfig) -> float:
    """Tokens of a step, on average."""
    if training.tokens_per_step is not None:
        return float(training.tokens_per_step)
    return float(lengths.mean()) * training.batch_size * training.gradient_accumulation


def _packs(
    rows: Any,
    lengths: npt.NDArray[np.int64],
    visual: npt.NDArray[np.int64],
    training: TrainingConfig,
    limits: PackLimits,
) -> tuple[list[tuple[int, npt.NDArray[np.int64]]], int | None]:
    """Packs with their steps, and the most tokens of one."""
    tokens, longest = training.max_tokens_per_pack, int(np.argmax(lengths))
    if tokens is not None and lengths[longest] > tokens:
        raise ConfigError(
            f"training.max_tokens_per_pack {tokens} is less than the {lengths[longest]} tokens of {rows[longest].id!r}; raise it,"
            " or lower data.max_length_tokens"
        )
    if tokens is None and math.isinf(limits.budget):
        tokens = max(training.batch_size * int(lengths[longest]), CPU_PACK_TOKENS)
    limits = replace(limits, tokens=tokens)
    if training.tokens_per_step is None:
        return list(plan_packs(lengths, visual, training, limits)), tokens
    capacity, packs_per_step = full_pack_size(lengths, training, limits)
    return list(plan_full_packs(lengths, training, capacity, packs_per_step)), capacity


def _check_packable(training: TrainingConfig, family: Family) -> None:
    for name in ("max_tokens_per_pack", "tokens_per_step"):
        if getattr(training, name) is not None:
            raise ConfigError(
                f"training.{name} is {getattr(training, name)} but {family.title} cannot be packed; leave it out"
            )


def resolve_optimizer(training: TrainingConfig, device: str) -> str:
    """Turns ``auto`` into the optimiser of the device.

    Args:
        training: Settings.
        device: ``cpu`` or ``cuda``.
    """
    if training.optimizer != "auto":
        return training.optimizer
    return "adamw_8bit" if device == "cuda" else "adamw"


def _write_batches(batches: Sequence[tuple[int, npt.NDArray[np.int64]]], path: Path) -> None:
    import pyarrow as pa

    schema = pa.schema([("step", pa.int32()), ("rows", pa.list_(pa.int64()))])
    table = pa.table([[step for step, _ in batches], [batch.tolist() for _, batch in batches]], schema=schema)
    # The stream format: what `datasets` maps into memory without a copy.
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table)


def _trained_parts(adapter: dict[str, Any], family: Family) -> set[str | None]:
    """Parts in which something learns, by an adapter's ``targets.json``."""
    return {*adapter["num_targets_by_part"], *(family.part_of(name) for name in adapter["modules_to_save"])}


def _embedding_can_move(config: dict[str, Any], adapter: dict[str, Any]) -> bool:
    """Whether the input embedding is frozen and not the head's, too. Full fine-tuning holds on to all weights."""
    text = config.get("text_config") or config
    # Which of the two says so depends on the family; the default where neither does is a shared one.
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    adapted = [target["name"] for target in adapter["targets"]]
    touched = any("embed_tokens" in name for name in (*adapted, *adapter["modules_to_save"]))
    return not (tied or touched or adapter.get("full_finetuning"))


def _head_learns(adapter: dict[str, Any]) -> bool:
    """Whether the language-model head's own weights do."""
    saved = any(name.rsplit(".", 1)[-1] == "lm_head" for name in adapter["modules_to_save"])
    return saved or "language" in adapter.get("full_finetuning", ())


def _device_memory_bytes(device: str) -> int | None:
    if device != "cuda":
        return None
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)
