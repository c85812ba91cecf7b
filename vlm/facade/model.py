"""``FastVisionModel``: load, adapt, train and save in a notebook's five calls. Heavy imports happen in the calls."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.config.model import LoraConfig, ModelConfig
from vlm.errors import ConfigError
from vlm.facade.options import check_fixed
from vlm.facade.settings import (
    ADAPTING,
    FIXED_ADAPTING,
    FIXED_LOADING,
    LOADING,
    adapter_folder,
    base_of,
    checked,
    checkpointing_of,
    device_of,
    hub_token,
    precision_of,
    quantization_of,
)
from vlm.facade.state import FacadeState, keep_state, state_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from vlm.facade.processor import VisionProcessor


class FastVisionModel:
    """Vision-language models for notebooks: the core under the names that notebooks use."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int | None = 2048,
        dtype: Any = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | None = None,
        device_map: Any = "sequential",
        use_gradient_checkpointing: bool | str = "unsloth",
        revision: str | None = None,
        double_quantization: bool = True,
        keep_unquantized: Sequence[str] = (),
        **others: Any,
    ) -> tuple[PreTrainedModel | PeftModel, VisionProcessor]:
        """Loads a model with its processor. The quantised weights stay in the cache folder for the next time.

        Args:
            model_name: Hub name, checkpoint folder, ``"builtin"``, or the folder of an adapter that was saved here.
            max_seq_length: Longest conversation in tokens, for the collator; None sets no limit.
            dtype: Of computation and of weights in 16 bit: a torch dtype or its name; None settles it by the device.
            load_in_4bit: Store linear layers as NF4.
            load_in_8bit: Store linear layers as LLM.int8(); needs ``load_in_4bit=False``.
            load_in_16bit: Store them in `dtype`; needs ``load_in_4bit=False``, which alone means the same.
            full_finetuning: All weights learn, in float32, without an adapter; needs ``load_in_4bit=False``.
            token: For gated and private models of the Hub.
            device_map: ``"auto"``, ``"sequential"`` or None take the first GPU, else the CPU; ``"cpu"`` and ``"cuda"`` insist.
            use_gradient_checkpointing: Recompute activations in training; ``"unsloth"`` means True.
            revision: Branch, tag or commit of a Hub model.
            double_quantization: Quantise NF4's block scales as well.
            keep_unquantized: Of ``"vision"``, ``"projector"`` and ``"language"``, the parts to leave in `dtype`.
            **others: Options of notebooks that only one value is possible for here.

        Returns:
            The model in evaluation mode, and its processor. An adapter's folder gives the adapted model.

        Raises:
            ConfigError: An option is unknown, contradicts another one, or would have no effect.
            ModelError: There is no such model.
            ResourceError: The device is not there, or its memory does not hold the model.
        """
        from vlm.facade.checkpoint import cached_checkpoint
        from vlm.loading.device import detect_device, resolve_precision

        check_fixed(LOADING, others, FIXED_LOADING, FastVisionModel.from_pretrained.__annotations__)
        quantization = quantization_of(load_in_4bit, load_in_8bit, load_in_16bit, full_finetuning)
        if max_seq_length is not None and max_seq_length < 1:
            raise ConfigError(f"{LOADING}: max_seq_length {max_seq_length} must be positive, or None for no limit")
        adapter_dir = adapter_folder(model_name)
        base_name = model_name if adapter_dir is None else base_of(adapter_dir)
        if adapter_dir is not None and full_finetuning:
            raise ConfigError(
                f"{LOADING}: {model_name!r} is an adapter, and full_finetuning trains the base itself; load the base, or"
                " merge the adapter with save_pretrained_merged and load the result"
            )
        device = detect_device(device_of(device_map))
        config = checked(
            LOADING,
            ModelConfig,
            name=base_name,
            revision=revision,
            quantization=quantization,
            double_quantization=double_quantization,
            keep_unquantized=tuple(keep_unquantized),
        )
        with hub_token(token):
            checkpoint_dir = cached_checkpoint(
                config, device=device, dtype=resolve_precision(precision_of(dtype), device)
            )
        from vlm.loading.checkpoint import load_checkpoint

        loaded = load_checkpoint(checkpoint_dir, device=device)
        state = FacadeState(
            loaded=loaded,
            name=base_name,
            max_seq_length=max_seq_length,
            gradient_checkpointing=checkpointing_of(use_gradient_checkpointing),
            full_finetuning=full_finetuning,
        )
        return _prepare(state, adapter_dir)

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel,
        r: int = 16,
        target_modules: str | Sequence[str] | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        loftq_config: Mapping[str, Any] | None = None,
        finetune_projector: bool = False,
        exclude_modules: Sequence[str] = (),
        rank_pattern: Mapping[str, int] | None = None,
        last_language_layers: int | None = None,
        last_vision_layers: int | None = None,
        **others: Any,
    ) -> PeftModel:
        """Puts a fresh LoRA adapter on a model.

        Args:
            model: What `from_pretrained` gave, without an adapter.
            r: Rank of the update matrices.
            target_modules: Names, name endings or regular expressions instead of the switches; None and ``"all-linear"``
                leave it to the switches.
            lora_alpha: The update is scaled by ``lora_alpha / r``.
            lora_dropout: Dropout on the input of the update matrices.
            bias: ``"none"``.
            finetune_vision_layers: Adapt the vision tower.
            finetune_language_layers: Adapt the language model.
            finetune_attention_modules: Adapt attention projections in the chosen towers.
            finetune_mlp_modules: Adapt feed-forward layers in the chosen towers.
            use_gradient_checkpointing: Recompute activations in training; ``"unsloth"`` means True.
            random_state: Seed of the initial weights.
            max_seq_length: Replaces the limit of `from_pretrained`; None keeps that.
            use_rslora: Scale by ``lora_alpha / sqrt(r)``.
            use_dora: Weight-decomposed adaptation.
            modules_to_save: Modules trained whole and saved with the adapter.
            loftq_config: None.
            finetune_projector: Adapt the projector between vision tower and language model.
            exclude_modules: Targets to leave out again.
            rank_pattern: Other ranks by name ending or regular expression.
            last_language_layers: Adapt only the last layers of the language model.
            last_vision_layers: Adapt only the last layers of the vision encoders.
            **others: Options of notebooks that only one value is possible for here.

        Returns:
            The adapted model; the given one is inside.

        Raises:
            ConfigError: An option is unknown or would have no effect, or the model has an adapter already.
            LoraError: A target matches nothing or cannot be adapted.
        """
        from vlm.lora.attach import attach_adapter
        from vlm.lora.build import build_adapter

        state = state_of(model)
        fixed = {"bias": bias, "loftq_config": loftq_config, **others}
        check_fixed(ADAPTING, fixed, FIXED_ADAPTING, FastVisionModel.get_peft_model.__annotations__)
        if state.full_finetuning:
            raise ConfigError(
                f"{ADAPTING}: the model was loaded with full_finetuning=True, so all its weights learn and an adapter has"
                " nothing to add; leave this call out, or load without full_finetuning"
            )
        if state.adapter_files:
            raise ConfigError(
                f"{ADAPTING}: the model has an adapter already; load the base model again for another one"
            )
        if isinstance(target_modules, str):
            target_modules = None if target_modules == "all-linear" else [target_modules]
        lora = checked(
            ADAPTING,
            LoraConfig,
            rank=r,
            alpha=lora_alpha,
            dropout=lora_dropout,
            target_modules=tuple(target_modules or ()),
            exclude_modules=tuple(exclude_modules),
            modules_to_save=tuple(modules_to_save or ()),
            rank_pattern=dict(rank_pattern or {}),
            finetune_vision_layers=finetune_vision_layers,
            finetune_language_layers=finetune_language_layers,
            finetune_attention_modules=finetune_attention_modules,
            finetune_mlp_modules=finetune_mlp_modules,
            finetune_projector=finetune_projector,
            last_language_layers=last_language_layers,
            last_vision_layers=last_vision_layers,
            use_rslora=use_rslora,
            use_dora=use_dora,
            seed=random_state,
        )
        state.gradient_checkpointing = checkpointing_of(use_gradient_checkpointing)
        if max_seq_length is not None:
            state.max_seq_length = max_seq_length
        with tempfile.TemporaryDirectory() as folder:
            build_adapter(state.loaded, lora, Path(folder))
            adapted = attach_adapter(state.loaded, Path(folder), trainable=True)
            return _finish_adapted(adapted, state, Path(folder))

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | None = None) -> Any:
        """Switches to training: dropout on, activations recomputed if asked for.

        Args:
            model: What `from_pretrained` or `get_peft_model` gave; changed in place.
            use_gradient_checkpointing: None takes what the model was loaded with.

        Returns:
            The same model.
        """
        from vlm.facade.modes import switch_to_training

        state = state_of(model)
        if use_gradient_checkpointing is not None:
            state.gradient_checkpointing = checkpointing_of(use_gradient_checkpointing)
        return switch_to_training(model, state)

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Switches to inference: dropout off, no recomputation (which would switch the cache off), the cache on.

        Args:
            model: What `from_pretrained` or `get_peft_model` gave; changed in place.

        Returns:
            The same model.
        """
        from vlm.facade.modes import switch_to_inference

        return switch_to_inference(model, state_of(model))


def _prepare(state: FacadeState, adapter_dir: Path | None) -> tuple[Any, VisionProcessor]:
    """Makes a freshly loaded model ready for a trainer, with its adapter if it has one."""
    from vlm.facade.processor import VisionProcessor
    from vlm.facade.saving import add_saving

    model, processor = state.loaded.model, VisionProcessor(state.loaded.processing)
    # Some models (Qwen2.5-VL) declare that they take no loss arguments, upon which trainers would not count a step's
    # tokens and give every micro-batch the same weight, however many supervised tokens it has.
    setattr(model, "accepts_loss_kwargs", True)  # noqa: B010, a name that the class does not declare
    keep_state(model, state)
    if adapter_dir is not None:
        from vlm.lora.attach import attach_adapter

        adapted = attach_adapter(state.loaded, adapter_dir, trainable=True)
        return _finish_adapted(adapted, state, adapter_dir), processor
    if state.full_finetuning:
        _start_full_finetuning(state)
    else:
        # Whoever forgets the adapter gets an error from the trainer, rather than training the base by mistake.
        model.requires_grad_(False)
    add_saving(model)
    return model, processor


def _start_full_finetuning(state: FacadeState) -> None:
    from vlm.lora.attach import attach_adapter
    from vlm.lora.build import build_adapter
    from vlm.lora.peft_model import TARGETS_FILE

    everything = LoraConfig(full_finetuning=("vision", "projector", "language"))
    with tempfile.TemporaryDirectory() as folder:
        build_adapter(state.loaded, everything, Path(folder))
        attach_adapter(state.loaded, Path(folder), trainable=True)
        state.adapter_files[TARGETS_FILE] = (Path(folder) / TARGETS_FILE).read_bytes()


def _targets(adapted: PeftModel, state: FacadeState) -> bytes:
    """``targets.json`` of a live adapter."""
    from vlm.lora.peft_model import adapter_parameters

    shapes = {
        key.removeprefix("base_model.model."): tensor.shape for key, tensor in adapter_parameters(adapted).items()
    }
    ranks = {
        key.removesuffix(".lora_A.weight"): shape[0] for key, shape in shapes.items() if key.endswith(".lora_A.weight")
    }
    parts = Counter(state.loaded.family.part_of(name) or "other" for name in ranks)
    checkpoint = json.loads((state.loaded.checkpoint_dir / "checkpoint.json").read_text(encoding="utf-8"))
    content = {
        "num_targets": len(ranks),
        "num_targets_by_part": dict(parts),
        "num_trainable_parameters": sum(shape.numel() for shape in shapes.values()),
        "num_base_parameters": checkpoint["num_parameters"],
        "base_name": checkpoint["source"],
        "base_digest": None,
        "targets": [{"name": name, "rank": rank} for name, rank in ranks.items()],
        "modules_to_save": sorted({key.rpartition(".")[0] for key in shapes if ".lora_" not in key}),
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _finish_adapted(adapted: PeftModel, state: FacadeState, adapter_dir: Path) -> PeftModel:
    from vlm.facade.saving import add_saving
    from vlm.lora.peft_model import CONFIG_FILE, TARGETS_FILE

    state.adapter_files[CONFIG_FILE] = (adapter_dir / CONFIG_FILE).read_bytes()
    described = (adapter_dir / TARGETS_FILE).is_file()
    # An adapter that was made elsewhere comes without our list of what it adapts.
    state.adapter_files[TARGETS_FILE] = (
        (adapter_dir / TARGETS_FILE).read_bytes() if described else _targets(adapted, state)
    )
    # trl turns the adapter of a model that says so to bfloat16, where small updates are rounded away.
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(adapted, name, False)
    add_saving(adapted)
    return adapted
