"""Settings of steps 6 and 7: generation, metrics and export."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vlm.config.base import Section

MetricName = Literal["cer", "wer", "exact_match"]
ExportType = Literal["lora", "merged_16bit", "merged_8bit", "merged_4bit", "gguf"]
GgufType = Literal["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


class GenerationConfig(Section):
    """How answers are generated for evaluation. Greedy, so that a rerun gives the same words."""

    split: Literal["validation", "test"] = Field("test", description="Held-out rows to answer.")
    max_rows: int | None = Field(None, ge=1, description="Answers only the first rows of the split; None answers all.")
    batch_size: int = Field(16, ge=1, le=1024, description="Conversations answered at once, sorted by length.")
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Longest answer; None takes one and a half times the longest answer of the training rows.",
    )
    evaluate_base_model: bool = Field(
        True, description="Answer with the untuned model as well, for comparison; cached apart."
    )


class EvaluationConfig(Section):
    """Which metrics are computed, and what counts as the same text."""

    metrics: tuple[MetricName, ...] = Field(
        ("cer", "wer", "exact_match"), min_length=1, description="Metrics to compute; the first one leads."
    )
    ignore_case: bool = Field(False, description="Compare in lower case.")
    ignore_punctuation: bool = Field(False, description="Remove punctuation before comparing.")
    collapse_whitespace: bool = Field(True, description="Treat any run of white space as one space and strip the ends.")
    unicode_form: Literal["NFC", "NFKC", "none"] = Field("NFC", description="Unicode normalisation before comparing.")


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
        " GGUF files are compared tensor by tensor in any case.",
    )
    verify_rows: int = Field(
        4, ge=1, le=64, description="Held-out rows on which exports are compared with the trained model."
    )
