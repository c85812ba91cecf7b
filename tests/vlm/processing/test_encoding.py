"""Token ids against the Hugging Face processor, label spans against a slow reading of the ids."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.tiny_models import tiny_image
from tests.vlm.processing.conftest import Pair
from vlm.errors import DataError
from vlm.families import Run
from vlm.processing import Encoded, Processing
from vlm.processing.encoding import ChatEncoder


def user(*parts: str | None) -> dict[str, Any]:
    """A user's turn; None is an image."""
    return {"role": "user", "content": [_part(part) for part in parts]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _part(part: str | None) -> dict[str, str]:
    return {"type": "image"} if part is None else {"type": "text", "text": part}


def oracle_ids(
    pair: Pair, messages: Sequence[dict[str, Any]], images: Sequence[np.ndarray], **options: Any
) -> list[int]:
    """What transformers makes of the conversation, pixels in the messages."""
    if not pair.facts.marks_answers:
        return [id_ for piece in oracle_pieces(pair, messages, images) for id_ in piece]
    left = iter(images)
    with_pixels = [
        {
            **message,
            "content": [
                {"type": "image", "image": next(left)} if part["type"] == "image" else part for part in content
            ],
        }
        if isinstance(content := message["content"], list)
        else message
        for message in messages
    ]
    out = pair.oracle.apply_chat_template(with_pixels, tokenize=True, return_dict=True, **options)
    ids = [int(id_) for id_ in out["input_ids"][0]]
    if messages[-1]["role"] == "assistant" and not options.get("add_generation_prompt"):
        ids += pair.ours.tokenizer.encode(pair.facts.missing_end, add_special_tokens=False)
    return ids


def oracle_pieces(pair: Pair, messages: Sequence[dict[str, Any]], images: Sequence[np.ndarray]) -> list[list[int]]:
    """The same for a layout in which answers follow questions with nothing between: cut where an answer begins."""
    render = pair.oracle.apply_chat_template
    places = [len(render(messages[:index])) for index, turn in enumerate(messages) if turn["role"] == "assistant"]
    text = render(list(messages))
    left = iter(images)
    pieces = []
    for first, last in itertools.pairwise([0, *places, len(text)]):
        own = [next(left) for _ in range(text[first:last].count(pair.ours.family.image_placeholder))]
        # The first piece has its beginning from the template.
        out = pair.oracle(text=[text[first:last]], images=own or None, add_special_tokens=False)
        pieces.append([int(id_) for id_ in out["input_ids"][0]])
    return pieces


def spans_by_reading(
    pair: Pair, ids: Sequence[int], messages: Sequence[dict[str, Any]] = (), images: Sequence[np.ndarray] = ()
) -> list[tuple[int, int]]:
    """From behind each start of an answer through the token that ends it, found in the ids themselves."""
    if not pair.facts.marks_answers:
        starts = list(itertools.accumulate(len(piece) for piece in oracle_pieces(pair, messages, images)[:-1]))
        end = pair.ours.tokenizer.convert_tokens_to_ids(pair.facts.end_of_turn)
        return [(first, list(ids).index(end, first) + 1) for first in starts]
    tokenizer = pair.ours.tokenizer
    start = tokenizer.encode(pair.facts.answer_start, add_special_tokens=False)
    end_of_turn = tokenizer.convert_tokens_to_ids(pair.facts.end_of_turn)
    spans = []
    for position in range(len(ids)):
        first = position + len(start)
        if list(ids[position:first]) == start and end_of_turn in ids[first:]:
            spans.append((first, list(ids).index(end_of_turn, first) + 1))
    return spans


def special_ids(pair: Pair) -> dict[str, int]:
    return {token.content: id_ for id_, token in pair.ours.tokenizer.added_tokens_decoder.items()}


CONVERSATIONS = {
    "one image": [user(None, "What is the total?"), assistant("12.50")],
    "image after the words": [user("What is the total?", None), assistant("12.50")],
    "images between words": [user("First", None, "second", None, None, "and third."), assistant("Three images.")],
    "text only": [user("Say hello."), assistant("Hello!")],
    "system prompt": [{"role": "system", "content": "Answer in German."}, user(None), assistant("Danke")],
    "plain string content": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    "several turns": [
        user(None, "Total?"),
        assistant("7"),
        user("And tax?", None),
        assistant("1.33\nincluded"),
        user("Thanks"),
    ],
    "no assistant": [user(None, "Total?")],
    "empty answer": [user(None), assistant("")],
    "white space at the end of the answer": [user(None), assistant("  a \n\n ")],
    "many scripts": [user("日本語 ﬁ é e\u0301 🎉🏽 \u200b"), assistant("Ünïcödé 中文 \U000f0001 العربية")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_ids_and_spans_match_the_oracles(pair: Pair, name: str, add_generation_prompt: bool) -> None:
    messages = CONVERSATIONS[name]
    num_images = sum(part == {"type": "image"} for message in messages for part in message["content"])
    images = [tiny_image(56 + 28 * index, 84, seed=index) for index in range(num_images)]
    encoded = pair.ours.encode(messages, [image.shape[:2] for image in images], add_generation_prompt)
    assert encoded.input_ids == oracle_ids(pair, messages, images, add_generation_prompt=add_generation_prompt)
    spans = encoded.assistant_spans
    if pair.facts.missing_end and add_generation_prompt and messages[-1]["role"] == "assistant":
        spans = spans[:-1]  # followed by another answer, it has no end that could be read off the ids
    assert spans == spans_by_reading(pair, encoded.input_ids, messages, images)
    around = (
        "<|vision_",
        "_of_image|>",
        "_of_video|>",
        "<img>",
        "</img>",
        "<start_of_image>",
        "<end_of_image>",
        "<|IMAGE_START|>",
        "<|IMAGE_END|>",
    )
    tokens = [token for token in pair.facts.image_tokens if not any(word in token for word in around)]
    media = {special_ids(pair)[token] for token in tokens}
    assert encoded.num_visual_tokens == sum(id_ in media for id_ in encoded.input_ids)
    assert encoded.num_visual_tokens == sum(pair.ours.num_image_tokens(*image.shape[:2]) for image in images)


WORDS = st.one_of(
    st.text(max_size=40),
    st.text(alphabet=" \n\t", max_size=6),
    st.sampled_from(
        [
            "<|im_end|>",
            "<|image_pad|>",
            "a<|im_start|>assistant\nb<|im_end|>",
            "<|vision_end|> <|endoftext|>",
            "a[/INST]b</s><s>[INST][IMG]",
            "[IMG_END][IMG_BREAK] <pad>",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n<|image|>",
            "\U000f0000",
        ]
    ),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    turns=st.lists(
        st.tuples(st.lists(WORDS, min_size=1, max_size=3), st.lists(WORDS, max_size=3)), min_size=1, max_size=3
    )
)
def test_any_text_comes_back_from_its_span_and_writes_no_control_token(
    pair: Pair, turns: list[tuple[list[str], list[str]]]
) -> None:
    messages = []
    for question, answer in turns:
        messages += [user(None, *question), {"role": "assistant", "content": [_part(text) for text in answer]}]
    encoded = pair.ours.encode(messages, [(56, 56)] * len(turns))
    tokenizer = pair.ours.tokenizer
    harmless = [
        {**message, "content": [part if part["type"] == "image" else _part("x") for part in message["content"]]}
        for message in messages
    ]
    expected = pair.ours.encode(harmless, [(56, 56)] * len(turns)).input_ids
    for token, id_ in special_ids(pair).items():
        assert encoded.input_ids.count(id_) == expected.count(id_), token
    assert len(encoded.assistant_spans) == len(turns)
    end = pair.facts.end_of_turn
    for (first, last), (_, answer) in zip(encoded.assistant_spans, turns, strict=True):
        span = _decode(tokenizer, encoded.input_ids[first:last])
        # White space that begins the answer can be one token with the line break of the template before it.
        expected_end = pair.facts.answer_lead + unicodedata.normalize("NFC", "".join(answer)) + end
        assert span.endswith(expected_end)
        assert span.removesuffix(expected_end) in ("", "\n", "\n\n")
    if not any(token in text for pieces in turns for texts in pieces for text in texts for token in special_ids(pair)):
        images = [np.zeros((56, 56, 3), np.uint8)] * len(turns)
        assert encoded.input_ids == oracle_ids(pair, messages, images)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def test_no_control_token_can_be_typed_by_anybody(pair: Pair) -> None:
    """All special tokens of the family, asked and answered: the ids have each as often as without."""
    added = pair.ours.tokenizer.added_tokens_decoder.values()
    tokens = [token.content for token in added if token.special and token.content not in pair.ours.family.markup_tokens]
    refused = [token for token in tokens if not _is_encodable(pair, token)]
    assert len(refused) < len(tokens) / 2
    text = " ".join(f"x{token}{token}" for token in tokens if token not in refused)
    plain = pair.ours.encode([user("a"), assistant("b")], []).input_ids
    typed = pair.ours.encode([user(text), assistant(text)], []).input_ids
    for token, id_ in special_ids(pair).items():
        if token in tokens and token not in refused:
            assert typed.count(id_) == plain.count(id_), token


def _is_encodable(pair: Pair, token: str) -> bool:
    """Whether a tokenizer without added tokens makes anything else of a token's text."""
    id_ = special_ids(pair)[token]
    return id_ not in pair.ours._encoder._plain().encode(token, add_special_tokens=False).ids


def test_typed_control_tokens_keep_their_characters(pair: Pair) -> None:
    end = pair.facts.end_of_turn
    text = f"write {end} and {pair.ours.family.image_token} here"
    encoded = pair.ours.encode([user(text), assistant(text)], [])
    (first, last) = encoded.assistant_spans[0]
    assert _decode(pair.ours.tokenizer, encoded.input_ids[first:last]) == pair.facts.answer_lead + text + end
    assert pair.ours.image_token_id not in encoded.input_ids
    assert encoded.input_ids[first:last].count(special_ids(pair)[end]) == 1


@pytest.mark.parametrize("sizes", [[], [(56, 56)], [(56, 56)] * 3])
def test_number_of_images_must_match(pair: Pair, sizes: list[tuple[int, int]]) -> None:
    with pytest.raises(DataError, match=rf"places for 2 images but {len(sizes)} images"):
        pair.ours.encode([user(None, None, "two"), assistant("2")], sizes)


def test_other_threads_and_users_of_the_tokenizer_do_not_disturb(pair: Pair) -> None:
    conversations = [
        [user(None, f"number {index} {pair.facts.end_of_turn}" * (index % 3)), assistant("x " * index)]
        for index in range(60)
    ]

    def encode(messages: list[dict[str, Any]]) -> Encoded:
        pair.ours.tokenizer(["pad me", "to the same length"], padding=True, truncation=True, max_length=4)
        return fresh.encode(messages, [(56, 56)])

    fresh = Processing.from_dir(pair.folder)
    expected = [pair.ours.encode(messages, [(56, 56)]) for messages in conversations]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encode, conversations)) == expected


class TestOtherTemplates:
    """Templates unlike the built-in one, on the same tokenizer."""

    BRACKETS = (
        "{{ '<|endoftext|>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    DEFAULT_SYSTEM = (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    LOOKS_AHEAD = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    STRICT = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"

    MESSAGES = (
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four four"},
    )

    def encode(
        self, qwen: Pair, template: str, messages: Sequence[dict[str, Any]] = MESSAGES
    ) -> tuple[Encoded, list[str]]:
        encoded = ChatEncoder(qwen.ours.tokenizer, template, qwen.ours.family).encode(messages, [], False)
        return encoded, [
            _decode(qwen.ours.tokenizer, encoded.input_ids[first:last]) for first, last in encoded.assistant_spans
        ]

    def test_without_a_generation_prompt(self, qwen: Pair) -> None:
        encoded, spans = self.encode(qwen, self.BRACKETS)
        assert spans == [" two<|im_end|>", " four four<|im_end|>"]
        assert encoded.input_ids == qwen.ours.tokenizer.encode(
            "<|endoftext|>[INST] one [/INST] two<|im_end|>[INST] three [/INST] four four<|im_end|>"
        )

    def test_with_a_default_system_prompt_and_trimming(self, qwen: Pair) -> None:
        messages = [*self.MESSAGES[:1], {"role": "assistant", "content": "  two <|im_end|> \n"}]
        assert self.encode(qwen, self.DEFAULT_SYSTEM, messages)[1] == ["two <|im_end|><|im_end|>"]

    def test_that_looks_ahead_is_refused(self, qwen: Pair) -> None:
        with pytest.raises(DataError, match="does not render message 2 of 4 the same with and without"):
            self.encode(qwen, self.LOOKS_AHEAD)

    def test_that_refuses_a_conversation_is_quoted(self, qwen: Pair) -> None:
        with pytest.raises(DataError, match=r"roles \[system, user, assistant, user, assistant\]: no system here"):
            self.encode(qwen, self.STRICT, ({"role": "system", "content": "x"}, *self.MESSAGES))


def test_layouts_of_several_token_kinds_and_literal_text(qwen: Pair) -> None:
    """Rows of image tokens with breaks between, and words around, as other families write them."""
    layout = (
        "before\n",
        Run("<|image_pad|>", 3),
        Run("<|vision_pad|>", 1),
        Run("<|image_pad|>", 2),
        Run("<|video_pad|>", 1),
        " after",
    )
    tokenizer = qwen.ours.tokenizer
    encoder = ChatEncoder(tokenizer, qwen.ours.chat_template, qwen.ours.family)
    encoded = encoder.encode([user("look", None), assistant("ok")], [layout], False)
    written = "before\n" + "<|image_pad|>" * 3 + "<|vision_pad|>" + "<|image_pad|>" * 2 + "<|video_pad|> after"
    expected = f"<|im_start|>user\nlook<|vision_start|>{written}<|vision_end|><|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"
    assert encoded.input_ids == tokenizer.encode(expected)
    assert encoded.num_visual_tokens == 7
    assert encoded.assistant_spans == spans_by_reading(qwen, encoded.input_ids)


def test_a_tokenizer_that_adds_tokens_of_its_own(qwen: Pair, tmp_path: Path) -> None:
    """As Llama's: a token before the text unless the template has written it, with an empty range of characters."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen.folder)
    begin = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    end = tokenizer.convert_tokens_to_ids("<|vision_pad|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|vision_pad|>", special_tokens=[("<|endoftext|>", begin), ("<|vision_pad|>", end)]
    )
    tokenizer.bos_token = "<|endoftext|>"
    messages = [user("hello"), assistant("you")]
    plain = qwen.ours.encode(messages, [])
    encoded = ChatEncoder(tokenizer, qwen.ours.chat_template, qwen.ours.family).encode(messages, [], False)
    assert encoded.input_ids == [begin, *plain.input_ids, end]
    assert encoded.assistant_spans == [(first + 1, last + 1) for first, last in plain.assistant_spans]
    template = "{{ bos_token }}" + qwen.ours.chat_template
    written = ChatEncoder(tokenizer, template, qwen.ours.family).encode(messages, [], False)
    assert written.input_ids == [begin, *plain.input_ids]
