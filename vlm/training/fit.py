"""Whether a training step fits into the GPU's memory at all, and what to do where it does not. No torch."""

from __future__ import annotations

from typing import Any

from vlm.config import TrainingConfig
from vlm.errors import ResourceError
from vlm.training.memory import MemoryEstimate


def check_fits(
    peak: MemoryEstimate,
    usable_bytes: int,
    sample: dict[str, Any],
    training: TrainingConfig,
    *,
    optimizer: str,
    is_quantized: bool,
    trains_whole: bool,
    num_spread: int,
    packed_rows: int | None,
) -> None:
    """Refuses a plan that needs more memory than there is even where the estimate errs upwards.

    Args:
        peak: Of the costliest micro-batch.
        usable_bytes: The GPU's memory without what the driver takes.
        sample: The costliest sample: `id`, `num_tokens`, `num_visual_tokens` and `image_sizes`.
        training: Settings.
        optimizer: As resolved for the device.
        is_quantized: Whether the base model is stored in few bits.
        trains_whole: Whether its own weights learn, and not an adapter's.
        num_spread: GPUs that the language model's layers are spread over.
        packed_rows: Conversations in the costliest pack; None without packing.

    Raises:
        ResourceError: With what takes the memory, and remedies.
    """
    if peak.at_least_bytes <= usable_bytes:
        return
    learning = f"{peak.adapter_bytes / 1e9:.1f} for what is trained, its gradients and the optimizer"
    needs = (
        f"a training step needs at least {peak.at_least_bytes / 1e9:.1f} GB of GPU memory"
        f" ({peak.weights_bytes / 1e9:.1f} for frozen weights, {learning}, the rest for activations)"
        f" but the GPU has {usable_bytes / 1e9:.1f} GB to give. "
    )
    remedies = _of_weights(optimizer, is_quantized, trains_whole, num_spread)
    if peak.weights_bytes + peak.adapter_bytes <= usable_bytes:
        sizes = ", ".join(f"{' x '.join(map(str, size))} pixels" for size in sample["image_sizes"]) or "no image"
        needs += (
            f"The costliest sample is {sample['id']!r}: {sample['num_tokens']} tokens, {sample['num_visual_tokens']} of them"
            f" visual, {sizes}. "
        )
        remedies = _of_activations(sample, training, packed_rows) + remedies
    raise ResourceError(
        needs + "Remedies: " + "; ".join(f"({number}) {remedy}" for number, remedy in enumerate(remedies, 1))
    )


def _of_activations(sample: dict[str, Any], training: TrainingConfig, packed_rows: int | None) -> list[str]:
    remedies = []
    if packed_rows is not None and packed_rows > 1:
        remedies.append("lower training.max_tokens_per_pack")
    if packed_rows is None and training.batch_size > 1:
        remedies.append("lower training.batch_size and raise training.gradient_accumulation by as much")
    if training.activation_memory not in ("auto", "offload"):
        remedies.append("set training.activation_memory to 'auto' or 'offload'")
    if not training.fused_kernels:
        remedies.append("turn training.fused_kernels on")
    if sample["num_visual_tokens"]:
        remedies.append("lower data.max_pixels")
    return [*remedies, "lower data.max_length_tokens"]


def _of_weights(optimizer: str, is_quantized: bool, trains_whole: bool, num_spread: int) -> list[str]:
    """Remedies where weights and what belongs to them leave too little room, which smaller samples do not change."""
    remedies = []
    # Its states are a quarter as large, but do not follow slices.
    if trains_whole and optimizer == "adamw" and num_spread == 1:
        remedies.append("set training.optimizer to 'adamw_8bit'")
    if trains_whole:
        remedies.append("train an adapter: leave lora.full_finetuning out, or name fewer parts there")
    elif not is_quantized:
        remedies.append("set model.quantization to 'nf4'")
    if num_spread == 1:
        remedies.append(
            "spread the language model's layers over several GPUs: training.distributed.num_processes 'auto' and"
            " training.distributed.strategy 'fsdp2'"
        )
    return [*remedies, "take a larger GPU" if num_spread == 1 else "take more or larger GPUs"]
