"""The ``Modelfile`` with which Ollama takes both GGUF files in, and its prompt template.

Ollama has templates of its own kind. This one is read off the model's chat template, which renders a conversation with
marks in the place of words; what stands around the marks is the template.
"""

from __future__ import annotations

from typing import Any

from vlm.errors import DataError
from vlm.export.gguf.metadata import puts_bos
from vlm.processing import Processing

_SYSTEM, _PROMPT, _ANSWER = (
    "\N{SNOWMAN}system\N{SNOWMAN}",
    "\N{SNOWMAN}prompt\N{SNOWMAN}",
    "\N{SNOWMAN}answer\N{SNOWMAN}",
)


def modelfile(processing: Processing, language_file: str, vision_file: str) -> str:
    """The file's text.

    Args:
        processing: The model's processor.
        language_file: Name of the language model's file.
        vision_file: Name of the mmproj file.
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
    tokenizer = processing.tokenizer
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(stop)}"' for stop in processing.stop_token_ids]
    return "\n".join(lines) + "\n"


def _render(processing: Processing, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
    text = processing.render(messages, add_generation_prompt)
    # Whoever runs the model puts this token there.
    return text.removeprefix(processing.tokenizer.bos_token) if puts_bos(processing) else text
