"""Settings of steps 1 and 2: the model and its LoRA adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlm.config.base import Section

BUILTIN_MODEL = "builtin"

Quantization = Literal["auto", "nf4", "int8", "none"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Part = Literal["vision", "projector", "language"]


class ModelConfig(Section):
    """Which model is loaded, and in which precision it is stored."""

    name: str = Field(
        BUILTIN_MODEL,
        min_length=1,
        description="Hub name (Qwen/Qwen2.5-VL-7B-Instruct), path of a checkpoint folder, or 'builtin' for the small model made here.",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of a Hub model; None takes the newest commit of its main branch."
    )
    quantization: Quantization = Field(
        "auto",
        description="How linear layers are stored: 4-bit NormalFloat (nf4), LLM.int8(), or none (the precision below)."
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

    finetune_vision_layers: bool = Field(True, description="Adapt the vision tower.")
    finetune_language_layers: bool = Field(True, description="Adapt the language model.")
    finetune_attention_modules: bool = Field(True, description="Adapt attention projections in the chosen towers.")
    finetune_mlp_modules: bool = Field(True, description="Adapt feed-forward layers in the chosen towers.")
    finetune_projector: bool = Field(False, description="Adapt the projector between vision tower and language model.")
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
    seed: int = Field(0, ge=0, description="Of the initial adapter weights.")

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
