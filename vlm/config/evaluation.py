"""Settings of steps 6 and 7: generation, metrics and export."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from vlm.config.base import Section

MetricName = Literal[
    "cer",
    "wer",
    "mer",
    "exact_match",
    "anls",
    "vqa_accuracy",
    "relaxed_accuracy",
    "token_f1",
    "field_f1",
    "json_similarity",
    "latex_edit_distance",
    "chrf",
    "rouge_l",
    "grounding_iou",
    "grounding_accuracy",
]
TaskName = Literal["ocr", "document_vqa", "vqa", "chart", "extraction", "latex", "caption", "grounding"]
TASK_METRICS: dict[TaskName, tuple[MetricName, ...]] = {
    "ocr": ("cer", "wer", "exact_match"),
    "document_vqa": ("anls", "exact_match", "token_f1"),
    "vqa": ("vqa_accuracy", "exact_match"),
    "chart": ("relaxed_accuracy", "exact_match"),
    "extraction": ("field_f1", "json_similarity", "exact_match"),
    "latex": ("latex_edit_distance", "exact_match"),
    "caption": ("chrf", "rouge_l"),
    "grounding": ("grounding_iou", "grounding_accuracy"),
}
ExportType = Literal["lora", "merged_16bit", "merged_8bit", "merged_4bit", "gguf"]
GgufType = Literal["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


class GenerationConfig(Section):
    """How answers are generated for evaluation. Greedy, so that a rerun gives the same words."""

    split: Literal["validation", "test"] = Field("test", description="Held-out rows to answer.")
    max_rows: int | None = Field(None, ge=1, description="Answers only the first rows of the split; None answers all.")
    batch_size: int = Field(
        64,
        ge=1,
        le=1024,
        description="Conversations answered at once, at most, sorted by length; fewer where the device's memory asks for it.",
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest answer; None takes one and a half times the longest answer of the training rows.",
    )
    num_processes: int | Literal["auto"] = Field(
        1,
        description="Processes of this machine that share the rows, one per GPU, each with a whole model; 'auto' takes every GPU"
        " that is there. Answers are the same but for rounding.",
    )
    evaluate_base_model: bool = Field(
        True, description="Answer with the untuned model as well, for comparison; cached apart."
    )

    @field_validator("num_processes")
    @classmethod
    def _some_process(cls, value: int | str) -> int | str:
        if value != "auto" and int(value) < 1:
            raise ValueError(f"num_processes {value} must be at least 1, or 'auto'")
        return value


class EvaluationConfig(Section):
    """Which metrics are computed, and what counts as the same text."""

    task: TaskName = Field("ocr", description="What the answers are; chooses the metrics where none are named.")
    metrics: tuple[MetricName, ...] | None = Field(
        None, min_length=1, description="Metrics to compute; the first one leads. None takes those of the task."
    )
    slice_by: tuple[str, ...] = Field(
        (),
        description="Columns of the sources without another role, or 'group'; every metric is also given for the rows of each"
        " of their values.",
    )
    ignore_case: bool = Field(
        False,
        description="Compare in lower case. This and the next three do not touch LaTeX and boxes, nor JSON's keys.",
    )
    ignore_punctuation: bool = Field(False, description="Remove punctuation before comparing.")
    collapse_whitespace: bool = Field(True, description="Treat any run of white space as one space and strip the ends.")
    unicode_form: Literal["NFC", "NFKC", "none"] = Field("NFC", description="Unicode normalisation before comparing.")

    @property
    def metric_names(self) -> tuple[MetricName, ...]:
        """The metrics to compute, the leading one first."""
        return TASK_METRICS[self.task] if self.metrics is None else self.metrics

    @model_validator(mode="after")
    def _nothing_twice(self) -> EvaluationConfig:
        for name, values in (("metrics", self.metrics or ()), ("slice_by", self.slice_by)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {list(values)} names something twice; leave the repetition out")
        return self


class ExportConfig(Section):
    """What is written for use elsewhere."""

    types: tuple[ExportType, ...] = Field(
        ("lora",),
        description="'lora' (the adapter), 'merged_16bit' (a whole model), 'merged_8bit' and 'merged_4bit' (quantised for"
        " transformers with bitsandbytes), 'gguf' (for llama.cpp and Ollama); () exports nothing.",
    )
    destination: str | None = Field(
        None,
        description="fsspec address that also receives a copy of every export, one folder per type; hf://user/name (or"
        " hf://user/name/folder) is a repository on the Hub.",
    )
    max_shard_size_mb: int = Field(4000, ge=1, description="Largest file of a merged model, in 10^6 bytes.")
    gguf_type: GgufType = Field(
        "q8_0",
        description="How a GGUF export stores the language model's matrices; its vision tower is in 16 bit.",
    )
    verify: bool = Field(
        True,
        description="Load every export again in a fresh process and fail unless it gives what the trained model gives;"
        " GGUF files are compared tensor by tensor in any case, and run by llama.cpp where llama_cpp is installed.",
    )
    verify_rows: int = Field(
        4, ge=1, le=64, description="Held-out rows on which exports are compared with the trained model."
    )
