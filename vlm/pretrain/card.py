"""The card of the pretrained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- ocr
- pretrained-from-scratch
---

# A small reader of text lines

Qwen2.5-VL's architecture with {num_parameters:.1f} million weights in bfloat16 and a byte-level tokenizer, trained from
random weights on drawn lines of text. It is a starting point for a first fine-tuning in minutes on a CPU, not a
replacement for a real model.

## Training

- {num_lines:,} drawn lines ({num_tokens:,} supervised tokens), each drawn image used {uses} time(s), {steps:,} steps of
  {positions:,} patches and tokens; {minutes:.1f} minutes on {device}, in {runs} run(s).
- Lines: words of seven European languages, names in twenty-five, entries of receipts and forms, figures, dates, addresses,
  codes, and characters at random, in twenty families of typefaces; turned, blurred, worn, grainy, light on dark.
- Nothing real was in it, and no typeface of the built-in dataset.
- Made by `python -m flows.pretrain_builtin`{by_steps}, seed {seed}. All settings are in `pretraining.json`.

## What it reads

| lines | number | CER | CER, case ignored | WER | lines without a mistake |
|---|---|---|---|---|---|
{rows}

## Limits

- One line, or up to four short ones, of Latin script; images up to some 900 pixels wide. It knows no layout and no tables.
- It knows seven questions, all for what is written, and answers others with nonsense until it is fine-tuned on them.
- Handwriting was two typefaces only: real hands it reads badly.
- It spells what it sees and knows few words, so unclear letters stay unclear.
"""


def card(content: Mapping[str, Any]) -> str:
    """Writes the card.

    Args:
        content: Of ``pretraining.json``.

    Returns:
        Markdown with the front matter that the Hub reads.
    """
    config, progress = content["config"], content["progress"]
    rows = [
        f"| {origin} | {reading['num_lines']} | {reading['cer']:.3f} | {reading['cer_ignoring_case']:.3f} |"
        f" {reading['wer']:.3f} | {reading['exact']:.0%} |"
        for origin, reading in content["readings"].items()
    ]
    by_steps = "" if config["num_steps"] is not None else f" (`--num_steps {progress['step']}` repeats its length)"
    return _CARD.format(
        num_parameters=content["num_parameters"] / 1e6,
        num_lines=progress["num_lines"],
        num_tokens=progress["num_tokens"],
        uses=config["uses_per_pack"],
        steps=progress["step"],
        positions=config["positions_per_step"],
        minutes=progress["seconds"] / 60,
        device=progress["device"],
        runs=progress["num_runs"],
        by_steps=by_steps,
        seed=config["seed"],
        rows="\n".join(rows),
    )
