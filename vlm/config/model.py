"""Settings of steps 1 and 2: the model and its LoRA adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlm.config.base import MAX_SEED, Section

BUILTIN_MODEL = "builtin"
# The same architecture at toy size with random weights, for trials of the machinery.
RANDOM_MODEL = "builtin-random"

Quantization = Literal["auto", "nf4", "int8", "none"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Part = Literal["vision", "projector", "language"]


class ModelConfig(Section):
    """Which model is loaded, and in which precision it is stored."""

    name: str = Field(
        BUILTIN_MODEL,
        min_length=1,
        description="Hub name (Qwen/Qwen2.5-VL-7B-Instruct), path of a checkpoint folder, or 'builtin' for the small model that comes with the code, or"
        " 'builtin-random' for a toy with random weights.",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of a Hub model; None takes the newest commit of its main branch."
    )
    quantization: Quantization = Field(
        "auto",
        description="How linear layers are stored: 4-bit NormalFloat (nf4), LLM.int8(), or none (the precision below; a model that"
        " bitsandbytes quantised already stays as it is)."
        " 'auto' is nf4 on a GPU, where memory is scarce, and none on a CPU, where unpacking costs more than it saves.",
    )
    double_quantization: bool = Field(
        True, description="Quantise NF4's block scales as well; saves about 0.4 bit per weight."
    )
    precision: Precision = Field(
        "auto",
        description="Of computation and of unquantised weights. 'auto' is bfloat16 on a GPU and float32 on a CPU.",
    )
    keep_unquantized: tuple[Part, ...] = Field(
        (),
        description="Parts kept in the precision above although quantisation is on, besides the language-model head, which always is.",
    )


class LoraConfig(Section):
    """Which layers learn, and how."""

    full_finetuning: tuple[Part, ...] = Field(
        (),
        description="Parts whose weights are all trained, without any adapter: 'vision', 'projector', 'language' (with its"
        " head). Needs model.quantization 'none'. () trains an adapter as set below.",
    )
    finetune_vision_layers: bool = Field(True, description="Adapt the vision tower.")
    finetune_language_layers: bool = Field(True, description="Adapt the language model.")
    finetune_attention_modules: bool = Field(True, description="Adapt attention projections in the chosen towers.")
    finetune_mlp_modules: bool = Field(True, description="Adapt feed-forward layers in the chosen towers.")
    finetune_projector: bool = Field(False, description="Adapt the projector between vision tower and language model.")
    last_language_layers: int | None = Field(
        None, ge=1, description="Adapt only this many layers of the language model, the last ones; None adapts all."
    )
    last_vision_layers: int | None = Field(
        None, ge=1, description="Adapt only this many layers of the vision encoders, the last ones; None adapts all."
    )
    target_modules: tuple[str, ...] = Field(
        (),
        description="Explicit targets instead of the switches: full module names, name endings ('q_proj'), or regular expressions that match a full name.",
    )
    exclude_modules: tuple[str, ...] = Field((), description="Targets to leave out again, in the same notations.")
    rank: int = Field(16, ge=1, le=4096, description="Rank r of the update matrices.")
    alpha: float = Field(
        16, gt=0, description="Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with rsLoRA)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update matrices.")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="Other ranks for modules whose name ends with, or matches, a key."
    )
    use_rslora: bool = Field(False, description="Rank-stabilised scaling (arXiv:2312.03732).")
    use_dora: bool = Field(False, description="Weight-decomposed adaptation (arXiv:2402.09353).")
    modules_to_save: tuple[str, ...] = Field(
        (), description="Modules trained whole and saved with the adapter, such as 'lm_head'."
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Of the initial adapter weights.")

    @model_validator(mode="after")
    def _nothing_beside_full_finetuning(self) -> LoraConfig:
        if not self.full_finetuning:
            return self
        if len(set(self.full_finetuning)) != len(self.full_finetuning):
            raise ValueError(f"full_finetuning {list(self.full_finetuning)} names a part twice; name each once")
        idle = [
            name
            for name, field in type(self).model_fields.items()
            if name != "full_finetuning" and getattr(self, name) != field.get_default(call_default_factory=True)
        ]
        if idle:
            raise ValueError(
                f"full_finetuning trains without an adapter, so lora.{idle[0]} would have no effect; leave it out, or leave"
                " full_finetuning out"
            )
        return self

    @model_validator(mode="after")
    def _layers_of_adapted_towers(self) -> LoraConfig:
        if self.target_modules:
            return self
        for name, switch in (
            ("last_language_layers", "finetune_language_layers"),
            ("last_vision_layers", "finetune_vision_layers"),
        ):
            if getattr(self, name) is not None and not getattr(self, switch):
                raise ValueError(f"{name} {getattr(self, name)} has no effect while {switch} is off; drop one of them")
        return self

    @model_validator(mode="after")
    def _some_target(self) -> LoraConfig:
        if self.target_modules or self.modules_to_save:
            return self
        towers = self.finetune_vision_layers or self.finetune_language_layers
        kinds = self.finetune_attention_modules or self.finetune_mlp_modules
        if not self.finetune_projector and not (towers and kinds):
            raise ValueError(
                "the LoRA switches leave nothing to train; turn on one of finetune_vision_layers / finetune_language_layers"
                " and one of finetune_attention_modules / finetune_mlp_modules, or finetune_projector, or name target_modules"
            )
        return self
