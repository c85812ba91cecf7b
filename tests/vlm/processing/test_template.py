"""Chat templates that write today's date write the same one every day."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.vlm.processing.conftest import Pair
from vlm.errors import ModelError
from vlm.processing import Processing
from vlm.processing.template import without_clock

# As in Llama 3.2's template: with a clock it writes today's date, without one this very day.
DATED = """\
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|im_start|>system\\nToday Date: " + date_string + "<|im_end|>\\n" }}"""


def test_a_dated_template_gives_the_same_tokens_every_day(qwen: Pair, tmp_path: Path) -> None:
    shutil.copytree(qwen.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(DATED + qwen.ours.chat_template, encoding="utf-8")
    processing = Processing.from_dir(tmp_path)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    today_as_stock = processing.tokenizer.apply_chat_template(messages, tokenize=False)
    dated = "<|im_start|>system\nToday Date: 26 Jul 2024<|im_end|>\n"
    assert not today_as_stock.startswith(dated)  # the clock works there
    assert processing.render(messages).startswith(dated)
    ids = processing.encode(messages, []).input_ids
    assert ids[: len(ids) - len(qwen.ours.encode(messages, []).input_ids)] == processing.tokenizer.encode(dated)
    # What is kept beside the model is its own file, and comes out the same when it is opened again.
    processing.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text(encoding="utf-8").startswith(DATED)
    assert Processing.from_dir(tmp_path / "saved").chat_template == processing.chat_template


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% set today = strftime_now('%Y-%m-%d') %}", '{% set today = "2024-07-26" %}'),
        ("{{ strftime_now( format = '%A' ) }}", '{{ "Friday" }}'),
        ("{{ a if strftime_now is defined else b }}", "{{ a if strftime_now is defined else b }}"),
    ],
)
def test_patterns_of_dates(source: str, expected: str) -> None:
    assert without_clock(source, Path("model")) == expected


def test_a_date_that_cannot_be_fixed_is_refused() -> None:
    with pytest.raises(ModelError, match=r"writes the date by 'strftime_now\(pattern\)"):
        without_clock("{% set pattern = '%Y' %}{{ strftime_now(pattern) }}", Path("model"))
