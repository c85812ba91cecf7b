"""Encoding by structure gives what encoding anew gives, and is not attempted where it could not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors

from tests.vlm.processing.conftest import Pair
from vlm.errors import DataError
from vlm.families import Run
from vlm.processing import Encoded
from vlm.processing import encoding as encoding_module
from vlm.processing import skeleton as module
from vlm.processing.encoding import ChatEncoder
from vlm.processing.skeleton import cutting_tokens, structure_of

# Counts images, writes a system prompt where there is none, tells string contents from lists: as the models' own templates do.
COUNTING = (
    "{% set seen = namespace(images=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' or 'image_url' in part %}"
    "{% set seen.images = seen.images + 1 %}{% if number_images %}Picture {{ seen.images }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\nTEXT<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def around(text: str) -> str:
    """A template for string contents that writes a turn's text like this."""
    return TURN.replace("TEXT", text) + PROMPT


# What templates do with texts that a few probes would not notice.
CURIOUS = {
    "trims": around("{{ m.content | trim }}"),
    "trims by method": around("{{ m.content.strip() }}"),
    "trims after adding": around("{{ (m.role + m.content) | trim }}"),
    "cuts": around("{{ m.content[:3] }}"),
    "measures": around("{% if m.content | length > 5 %}long{% endif %}{{ m.content }}"),
    "asks whether it is empty": around("{% if m.content %}{{ m.content }}{% endif %}"),
    "compares": around("{% if m.content != 'seven' %}{{ m.content }}{% endif %}"),
    "searches": around("{% if '</think>' in m.content %}thought{% endif %}{{ m.content }}"),
    "searches after adding": around("{% set c = '' + m.content %}{% if 'seven' in c %}7{% endif %}{{ c }}"),
    "splits": around("{{ m.content.split('</think>')[-1] }}"),
    "walks through it": around("{% for c in m.content %}{{ c }}{% endfor %}"),
    "looks into a joined copy": around("{% set c = m.content ~ '' %}{% if 'seven' in c %}7{% endif %}{{ c }}"),
    "looks into a list's copy": around("{% set c = [m.content] | join %}{% if 'seven' in c %}7{% endif %}{{ c }}"),
    "looks into a formatted copy": around("{% set c = '%s' % (m.content,) %}{% if 'seven' in c %}7{% endif %}{{ c }}"),
    "looks into JSON": around("{% set c = m.content | tojson %}{% if 'seven' in c %}7{% endif %}{{ c }}"),
    "looks into a block": around("{% set c %}{{ m.content }}{% endset %}{% if 'seven' in c %}7{% endif %}{{ c }}"),
    "looks into a macro": "{% macro w(t) %}{{ t }}{% endmacro %}"
    + around("{% set c = w(m.content) %}{% if 'seven' in c %}7{% endif %}{{ c }}"),
    "filters a block": around("{% filter upper %}{{ m.content }}{% endfilter %}"),
    "writes the date": around("{{ m.content }}{{ strftime_now('%Y') }}"),
}
CONVERSATION = ("one", "two", "is it seven?", " </think> seven \n")
TEXT = st.one_of(
    st.text(max_size=30),
    st.text(alphabet=" \n\t", max_size=5),
    st.sampled_from(["<", "<|im_", "end|>", "|>", "<|image_", "pad|>", "<|im_end|>", "\U000f0000", "\U0010f000"]),
)


def messages_of(texts: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def both(
    encoder: ChatEncoder, messages: Sequence[dict[str, Any]], layouts: Any = (), prompt: bool = False
) -> tuple[Encoded | str, Encoded | str]:
    """The result, or the error, with the help of skeletons and without."""
    results: list[Encoded | str] = []
    for encode in (encoder.encode, encoder.encode_anew):
        try:
            results.append(encode(messages, layouts, prompt))
        except DataError as error:
            results.append(str(error))
    return results[0], results[1]


@pytest.fixture
def pair(qwen: Pair) -> Pair:
    """Templates and layouts here are written with this family's tokens."""
    return qwen


@pytest.fixture(params=["built-in", "counting"])
def encoder(pair: Pair, request: pytest.FixtureRequest) -> ChatEncoder:
    template = pair.ours.chat_template if request.param == "built-in" else COUNTING
    return ChatEncoder(pair.ours.tokenizer, template, pair.ours.family)


PARTS = st.lists(st.one_of(st.none(), TEXT), min_size=1, max_size=4)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    turns=st.lists(st.tuples(PARTS, st.one_of(TEXT, st.lists(TEXT, max_size=3))), min_size=1, max_size=2),
    system=st.none() | TEXT,
    prompt=st.booleans(),
    counts=st.lists(st.integers(1, 9), min_size=8, max_size=8),
)
def test_any_conversation_comes_out_as_without_skeletons(
    encoder: ChatEncoder, turns: list[Any], system: str | None, prompt: bool, counts: list[int]
) -> None:
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    num_images = 0
    for parts, answer in turns:
        num_images += parts.count(None)
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
        said = answer if isinstance(answer, str) else [{"type": "text", "text": text} for text in answer]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
    layouts = [(Run("<|image_pad|>", count),) for count in counts[:num_images]]
    by_skeleton, anew = both(encoder, messages, layouts, prompt)
    assert by_skeleton == anew


def test_rows_of_one_structure_share_one_skeleton(encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = messages_of(CONVERSATION)
    anew = encoder.encode_anew(messages, [], False)
    encoder.encode(messages, [], False)
    assert len(encoder._skeletons) == 1
    assert None not in encoder._skeletons.values()
    monkeypatch.setattr(encoder, "encode_anew", None)
    monkeypatch.setattr(encoder, "_render", None)
    assert encoder.encode(messages, [], False) == anew


@pytest.mark.parametrize("name", CURIOUS)
def test_a_template_that_looks_at_a_text_gets_no_skeleton(pair: Pair, name: str) -> None:
    encoder = ChatEncoder(pair.ours.tokenizer, CURIOUS[name], pair.ours.family)
    for texts in (CONVERSATION[:2], ("one", "seven"), ("", ""), ("  a ", "</think>b")):
        by_skeleton, anew = both(encoder, messages_of(texts))
        assert by_skeleton == anew
    assert set(encoder._skeletons.values()) == {None}


@pytest.mark.parametrize(
    "text", ["{{ m.content }}", "{{ 'a ' + m.content + ' b' }}", "{{ m['content'] if m.content is string else '' }}"]
)
def test_a_template_that_writes_texts_gets_one(pair: Pair, text: str) -> None:
    encoder = ChatEncoder(pair.ours.tokenizer, around(text), pair.ours.family)
    for texts in (CONVERSATION, ("",) * 4):
        by_skeleton, anew = both(encoder, messages_of(texts))
        assert by_skeleton == anew
    assert None not in encoder._skeletons.values()


def test_an_answer_that_ends_the_text_gets_none(pair: Pair) -> None:
    """Where nothing of the template follows, the answer's own white space decides where its span ends."""
    encoder = ChatEncoder(pair.ours.tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}", pair.ours.family)
    by_skeleton, anew = both(encoder, messages_of(("one ", "two \n")))
    assert by_skeleton == anew
    assert set(encoder._skeletons.values()) == {None}


def test_tokens_across_the_ends_of_a_turn_belong_to_it(pair: Pair) -> None:
    """The tokenizer joins the end of the prompt with the start of the answer, and the end of the turn with white space."""
    template = TURN.replace("TEXT<|im_end|>", "to{{ m.content }}!") + PROMPT.replace("assistant\n", "assistant\nto")
    encoder = ChatEncoder(pair.ours.tokenizer, template, pair.ours.family)
    by_skeleton, anew = both(encoder, messages_of(("x", "tal")))
    assert by_skeleton == anew
    assert isinstance(anew, Encoded)
    ((first, last),) = anew.assistant_spans
    assert pair.ours.tokenizer.decode(anew.input_ids[first:last]).strip() == "total!"
    assert None not in encoder._skeletons.values()


@pytest.mark.parametrize("texts", [("<|image_", "pad|>"), ("<|im_", "end|>"), ("<|image_pad|", ">")])
def test_parts_that_together_spell_a_control_token(encoder: ChatEncoder, texts: tuple[str, str]) -> None:
    parts = [{"type": "text", "text": text} for text in texts]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "no"}]
    by_skeleton, anew = both(encoder, messages)
    assert by_skeleton == anew


def test_more_fields_than_usual_are_left_to_the_template() -> None:
    plain = {"role": "user", "content": "x"}
    assert structure_of([plain], False) == ((False, "user", "text"), ["x"])
    for message in (
        {**plain, "name": "Ada"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "image", "detail": "high"}]},
        {"role": "user", "content": [{"type": "text", "text": "x", "cache": 1}]},
        {"role": "user", "content": [{"type": "audio"}]},
    ):
        assert structure_of([message], False) is None


def test_structures_are_told_apart() -> None:
    text, image = {"type": "text", "text": "x"}, {"type": "image"}
    contents: list[Any] = ["x", [], [text], [image], [text, image], [image, text], [image, image, text]]
    structures = [structure_of([{"role": "user", "content": content}], False) for content in contents]
    assert len({found[0] for found in structures if found is not None}) == len(contents)


def test_memory_is_bounded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_module, "_MAX_SKELETONS", 3)
    monkeypatch.setattr(module, "_MEMO_ENTRIES", 5)
    encoder = ChatEncoder(pair.ours.tokenizer, pair.ours.chat_template, pair.ours.family)
    for number in range(12):
        messages = messages_of([f"{number} {turn}" for turn in range(number + 1)])
        by_skeleton, anew = both(encoder, messages)
        assert by_skeleton == anew
    assert len(encoder._skeletons) == 3
    assert 0 < len(encoder._memo) <= 5


def with_added(tokenizer: Tokenizer, **options: Any) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens([AddedToken(options.pop("content"), **options)])
    return copy


def test_tokens_that_others_can_reach_into_do_not_cut(pair: Pair) -> None:
    plain = pair.ours.tokenizer.backend_tokenizer
    usual = set(cutting_tokens(plain))
    assert {"<|im_start|>", "<|im_end|>", "<|image_pad|>"} <= usual
    for options in ({"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}):
        assert set(cutting_tokens(with_added(plain, content="<|more|>", **options))) == usual
    assert set(cutting_tokens(with_added(plain, content="word"))) == usual
    assert set(cutting_tokens(with_added(plain, content="<o<"))) == usual - {
        token for token in usual if token[0] == "<"
    }
    # The longer token holds the shorter one, and nothing ends or begins within it.
    assert set(cutting_tokens(with_added(plain, content="x<|im_end|>y"))) == usual - {"<|im_end|>"}


@pytest.mark.parametrize(
    "change", ["spaces trimmed from offsets", "a space before the first word", "tokens of its own"]
)
def test_tokenizers_of_other_habits(pair: Pair, change: str) -> None:
    tokenizer = copy.deepcopy(pair.ours.tokenizer)
    backend = tokenizer.backend_tokenizer
    if change == "spaces trimmed from offsets":
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    elif change == "a space before the first word":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        )
    else:
        begin = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
        )
    for template in (around("{{ m.content }}"), "so " + around(" {{ m.content }} ")):
        encoder = ChatEncoder(tokenizer, template, pair.ours.family)
        for texts in (CONVERSATION, (" ", " \n "), ("a", "")):
            by_skeleton, anew = both(encoder, messages_of(texts))
            assert by_skeleton == anew
        has_skeleton = any(encoder._skeletons.values())
        assert has_skeleton == (change != "tokens of its own")
