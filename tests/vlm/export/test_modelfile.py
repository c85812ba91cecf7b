"""The Modelfile, read by the rules of Go's templates."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm.export.gguf.modelfile import context_tokens, modelfile
from vlm.processing import Processing

# Braces and quotation marks everywhere: before the words, behind them, and doubled.
AWKWARD = r'''
{%- for message in messages -%}
{{ '{"role": "' }}{{ message.role }}{{ '", "text": """{{{' }}
{%- if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}{% endif -%}
{{ '}}}"""}' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '{"role": "assistant", "text": """{{{' }}{% endif -%}
'''
ACTION = re.compile(r'\{\{ (?:if (?P<if>\.\w+)|(?P<end>end)|(?P<field>\.\w+)|(?P<text>"(?:[^"\\]|\\.)*")) \}\}')


def template_of(text: str) -> str:
    """What stands between the marks: a value that begins with three quotation marks ends at the next three."""
    start = text.index('TEMPLATE """') + len('TEMPLATE """')
    end = text.index('"""', start)
    assert text[end + 3] == "\n"
    return text[start:end]


def rendered(template: str, values: dict[str, str]) -> str:
    """What Go's text/template makes of it, as far as it is used here: fields, constants, ``if`` and ``end``."""
    pieces, position, skipped = [], 0, False
    while (opening := template.find("{{", position)) >= 0:
        action = ACTION.match(template, opening)
        assert action is not None, template[opening:]
        written = template[position:opening]
        if action["field"]:
            written += values[action["field"]]
        elif action["text"]:
            written += json.loads(action["text"])
        pieces.append("" if skipped else written)
        skipped = not values[action["if"]] if action["if"] else skipped and not action["end"]
        position = action.end()
    return "".join(pieces) + template[position:]


def test_braces_and_quotation_marks_of_a_chat_template_come_out_as_they_are(tiny_run: Callable, tmp_path: Path) -> None:
    shutil.copytree(tiny_run("qwen2_vl").checkpoint_dir / "processor", tmp_path / "processor")
    (tmp_path / "processor" / "chat_template.jinja").write_text(AWKWARD)
    processing = Processing.from_dir(tmp_path / "processor")
    template = template_of(modelfile(processing, "model.gguf", "mmproj.gguf"))
    for system in ("", "Be brief."):
        values = {".System": system, ".Prompt": "What is it?", ".Response": "A dog."}
        roles = ([("system", system)] if system else []) + [("user", "What is it?"), ("assistant", "A dog.")]
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in roles]
        expected = processing.render(messages)
        assert '"""{{{What is it?}}}"""}' in expected
        assert rendered(template, values) == expected


@pytest.mark.parametrize(
    ("longest", "limit", "expected"),
    [
        (100, None, 4096),
        (100, 2048, 2048),
        (2731, 32768, 5120),  # 4096.5
        (2730, 32768, 4096),
        (12_000, 32_768, 18_432),
        (30_000, 32_768, 32_768),
    ],
)
def test_the_context_holds_the_longest_conversation(longest: int, limit: int | None, expected: int) -> None:
    assert context_tokens(longest, limit) == expected


def test_the_contexts_length_stands_where_it_is_known(tiny_run: Callable) -> None:
    processing = tiny_run("qwen2_vl").loaded.processing
    assert processing.context_length_tokens is not None
    expected = f"PARAMETER num_ctx {context_tokens(3000, processing.context_length_tokens)}"
    assert expected in modelfile(processing, "model.gguf", "mmproj.gguf", 3000).splitlines()
    assert "num_ctx" not in modelfile(processing, "model.gguf", "mmproj.gguf")
