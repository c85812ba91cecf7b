"""Ready conversations are brought to one form, or refused with a reason."""

from __future__ import annotations

import json

import pytest

from vlm.data.messages import parse_conversation
from vlm.data.rows import RowError

USER = {"role": "user", "content": "What is it?"}
ASSISTANT = {"role": "assistant", "content": "A cat."}
IMAGE = {"type": "image"}


def text(words):
    return [{"type": "text", "text": words}]


def test_text_contents_become_parts_and_json_is_read():
    expected = [{"role": "user", "content": text("What is it?")}, {"role": "assistant", "content": text("A cat.")}]
    assert parse_conversation([USER, ASSISTANT], []) == (expected, [])
    assert parse_conversation(json.dumps([USER, ASSISTANT]), []) == (expected, [])


def test_images_keep_the_order_of_their_parts():
    content = [
        IMAGE,
        {"type": "text", "text": "and"},
        {"type": "image", "image": "b.png"},
        {"type": "image_url", "image_url": {"url": "c.png"}},
    ]
    second = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": "d.png"}, {**IMAGE, "image": None, "text": None}],
    }
    messages, images = parse_conversation(
        [{"role": "user", "content": content}, ASSISTANT, second, ASSISTANT], ["a.png", "e.png"]
    )
    assert images == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert messages[0]["content"] == [IMAGE, {"type": "text", "text": "and"}, IMAGE, IMAGE]
    assert messages[2]["content"] == [IMAGE, IMAGE]


@pytest.mark.parametrize(
    ("messages", "images", "reason"),
    [
        (None, [], "bad_messages"),
        ([], [], "bad_messages"),
        ("not json", [], "bad_messages"),
        ('{"role": "user"}', [], "bad_messages"),
        (["hello"], [], "bad_message"),
        ([{"role": "user"}], [], "bad_message"),
        ([{"role": "user", "content": 7}, ASSISTANT], [], "bad_message"),
        ([{"role": "tool", "content": "x"}, ASSISTANT], [], "bad_role"),
        ([{"role": "user", "content": [{"type": "video"}]}, ASSISTANT], [], "bad_part_type"),
        ([{"role": "user", "content": [{"type": "text"}]}, ASSISTANT], [], "bad_part_type"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT], [], "bad_part_type"),
        ([{"role": "user", "content": ["x"]}, ASSISTANT], [], "bad_part_type"),
        ([USER, {"role": "assistant", "content": [IMAGE]}], [], "bad_part_type"),
        ([USER, USER, ASSISTANT], [], "bad_order"),
        ([ASSISTANT], [], "bad_order"),
        ([USER, {"role": "system", "content": "x"}, ASSISTANT], [], "bad_order"),
        ([USER], [], "no_answer"),
        ([{"role": "system", "content": "x"}], [], "no_answer"),
        ([USER, {"role": "assistant", "content": " \n"}], [], "empty_answer"),
        ([USER, ASSISTANT], ["a.png"], "image_count"),
        ([{"role": "user", "content": [IMAGE, IMAGE]}, ASSISTANT], ["a.png"], "image_count"),
    ],
)
def test_broken_rules_have_a_reason(messages, images, reason):
    with pytest.raises(RowError) as caught:
        parse_conversation(messages, images)
    assert caught.value.reason == reason


def test_text_placeholders_are_explained():
    with pytest.raises(RowError, match="'<image>' inside text is not a placeholder"):
        parse_conversation([{"role": "user", "content": "<image> What?"}, ASSISTANT], ["a.png"])
