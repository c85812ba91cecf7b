"""The ``Modelfile`` with which Ollama takes both GGUF files in, and its prompt template.

Ollama has templates of its own kind (Go's). This one is read off the model's chat template, which renders a conversation
with marks in the place of words; what stands around the marks is the template.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vlm.errors import DataError
from vlm.export.gguf.metadata import puts_bos
from vlm.processing import Processing

_SYSTEM, _PROMPT, _ANSWER = (
    "\N{SNOWMAN}system\N{SNOWMAN}",
    "\N{SNOWMAN}prompt\N{SNOWMAN}",
    "\N{SNOWMAN}answer\N{SNOWMAN}",
)
# Room for longer answers and prompts than were seen, as where the longest answer is bounded (`vlm.generate`).
_ROOM = 1.5
_STEP_TOKENS = 1024
# What Ollama takes by itself on most machines; less would save little.
_LEAST_TOKENS = 4096


def modelfile(processing: Processing, language_file: str, vision_file: str, longest_tokens: int | None = None) -> str:
    """The file's text.

    Args:
        processing: The model's processor.
        language_file: Name of the language model's file.
        vision_file: Name of the mmproj file.
        longest_tokens: Longest conversation that the model is meant for; None leaves the context's length to Ollama.
    """
    user: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": _PROMPT}]}
    system: dict[str, Any] = {"role": "system", "content": [{"type": "text", "text": _SYSTEM}]}
    answer: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
    asked = _render(processing, [user], add_generation_prompt=True)
    template = asked.replace(_PROMPT, "{{ .Prompt }}") + "{{ .Response }}"
    before, _, _ = asked.partition(_PROMPT)
    try:
        with_system, _, _ = _render(processing, [system, user], add_generation_prompt=True).partition(_PROMPT)
    except DataError:
        with_system = ""  # a template that knows no system turn
    if _SYSTEM in with_system:
        rest = template.removeprefix(before)
        chosen = with_system.replace(_SYSTEM, "{{ .System }}")
        if chosen.endswith(before):
            template = f"{{{{ if .System }}}}{chosen.removesuffix(before)}{{{{ end }}}}{before}{rest}"
        else:  # without a system turn, the chat template puts something in its place
            template = f"{{{{ if .System }}}}{chosen}{{{{ else }}}}{before}{{{{ end }}}}{rest}"
    _, _, end = _render(processing, [user, answer]).partition(_ANSWER)
    lines = [
        f"FROM ./{language_file}",
        f"FROM ./{vision_file}",
        f'TEMPLATE """{template}{end}"""',
        "# Answers are greedy, as they were evaluated.",
        "PARAMETER temperature 0",
    ]
    if longest_tokens is not None:
        num_ctx = context_tokens(longest_tokens, processing.context_length_tokens)
        lines += [
            f"# For conversations of {longest_tokens} tokens and more, with images and answers.",
            f"PARAMETER num_ctx {num_ctx}",
        ]
    tokenizer = processing.tokenizer
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(stop)}"' for stop in processing.stop_token_ids]
    return "\n".join(lines) + "\n"


def context_tokens(longest_tokens: int, limit_tokens: int | None) -> int:
    """Length of the context to reserve memory for: half as much again as was needed, rounded up.

    Args:
        longest_tokens: Longest conversation that the model is meant for.
        limit_tokens: Longest sequence that the model was made for; None where its config does not say.

    Returns:
        A multiple of 1024, at least 4096; the limit, if that is less.
    """
    wanted = max(_LEAST_TOKENS, math.ceil(_ROOM * longest_tokens / _STEP_TOKENS) * _STEP_TOKENS)
    return wanted if limit_tokens is None else min(wanted, limit_tokens)


def longest_conversation(dataset_dir: Path) -> int:
    """Tokens of the longest conversation in any split, images and answers included.

    Args:
        dataset_dir: Prepared dataset.
    """
    summary = json.loads((dataset_dir / "summary.json").read_text(encoding="utf-8"))
    return max(int(split["longest_tokens"]) for split in summary["splits"].values())


def _render(processing: Processing, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    """The conversation as a piece of Go's template language, still with its marks."""
    text = processing.render(messages, add_generation_prompt)
    if puts_bos(processing):
        # Whoever runs the model puts this token there.
        text = text.removeprefix(processing.tokenizer.bos_token)
    # A brace may stand before one that opens an action, and three quotation marks would end the template: both go in as
    # constants, one by one.
    return "".join({"{": '{{ "{" }}', '"': r'{{ "\"" }}'}.get(char, char) for char in text)
