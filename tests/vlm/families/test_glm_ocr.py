"""GLM-OCR: sizes by a rule that counts frames, and answers that end where the next turn would begin."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tiny_models import make_tiny_checkpoint
from vlm.errors import DataError
from vlm.processing import Processing
from vlm.processing.encoding import ChatEncoder


@pytest.fixture(scope="module")
def processing(tmp_path_factory: pytest.TempPathFactory) -> Processing:
    return Processing.from_dir(make_tiny_checkpoint("glm_ocr", tmp_path_factory.mktemp("glm_ocr")))


SIDES = st.one_of(st.integers(1, 60), st.integers(1, 3000))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(height=SIDES, width=SIDES, limits=st.none() | st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)))
def test_target_size_is_the_stock_one(
    processing: Processing, height: int, width: int, limits: tuple[int, int] | None
) -> None:
    from transformers.models.glm46v.image_processing_pil_glm46v import smart_resize

    size = processing.image_processor.size
    bounds = sorted(limits) if limits else [size["shortest_edge"] / 2, size["longest_edge"] / 2]
    try:
        # A still image is two equal frames, and the stock limits are those of both together.
        expected = smart_resize(2, height, width, 2, 28, 2 * bounds[0], 2 * bounds[1])
    except ValueError:
        with pytest.raises(DataError, match=f"{height} x {width} pixels is more elongated than 1 : 200"):
            processing.target_size(height, width)
        return
    assert processing.target_size(height, width, *(sorted(limits) if limits else ())) == expected


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def written(processing: Processing, encoder: ChatEncoder, messages: list[dict[str, Any]]) -> tuple[str, list[str]]:
    encoded = encoder.encode(messages, [], False)
    decode = processing.tokenizer.decode
    return decode(encoded.input_ids), [decode(encoded.input_ids[first:last]) for first, last in encoded.assistant_spans]


def test_each_answer_learns_its_end(processing: Processing) -> None:
    encoder = ChatEncoder(processing.tokenizer, processing.chat_template, processing.family)
    text, answers = written(processing, encoder, [user("a"), assistant("b "), user("c"), assistant("d")])
    assert text == "[gMASK]<sop><|user|>\na<|assistant|>\nb <|user|>\nc<|assistant|>\nd<|user|>"
    assert answers == ["b <|user|>", "d<|user|>"]
    text, answers = written(processing, encoder, [user("a"), assistant("b"), user("c")])
    assert text == "[gMASK]<sop><|user|>\na<|assistant|>\nb<|user|>\nc"
    assert answers == ["b<|user|>"]
    text, answers = written(processing, encoder, [user("a"), assistant("b"), {"role": "system", "content": "c"}])
    assert text.endswith("b<|system|>\nc")
    assert answers == ["b"]


def test_a_template_that_ends_answers_itself_gets_no_second_end(processing: Processing) -> None:
    template = processing.chat_template.replace(
        "{%- endfor -%}\n{%- if add",
        "{%- if message['role'] == 'assistant' and loop.last -%}{{- '<|user|>' -}}{%- endif -%}\n"
        "{%- endfor -%}\n{%- if add",
    )
    assert template != processing.chat_template
    encoder = ChatEncoder(processing.tokenizer, template, processing.family)
    text, answers = written(processing, encoder, [user("a"), assistant("d")])
    assert text == "[gMASK]<sop><|user|>\na<|assistant|>\nd<|user|>"
    assert answers == ["d<|user|>"]


def test_a_prompt_for_generation_is_left_open(processing: Processing) -> None:
    encoder = ChatEncoder(processing.tokenizer, processing.chat_template, processing.family)
    ids = encoder.encode([user("a")], [], True).input_ids
    assert processing.tokenizer.decode(ids) == "[gMASK]<sop><|user|>\na<|assistant|>\n"
    assert processing.tokenizer.convert_tokens_to_ids("<|user|>") in processing.stop_token_ids
