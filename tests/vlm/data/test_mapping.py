"""Columns are found or refused before a row is read; their values become words."""

from __future__ import annotations

import datetime
import decimal
from dataclasses import replace

import pytest

from vlm.config.data import ColumnMapping, DataConfig
from vlm.data.mapping import map_row, resolve_columns
from vlm.data.rows import RowError
from vlm.data.sources import RowStream
from vlm.errors import DataError

STREAM = RowStream(0, "rows.jsonl", None, ("image", "question", "text", "page"), None, lambda: iter(()))


def mapped(row, *, columns=None, **settings):
    data = DataConfig(columns=ColumnMapping(**(columns or {})), **settings)
    return map_row(row, resolve_columns(data.columns, replace(STREAM, columns=tuple(row))), data)


def test_an_unknown_column_is_refused_with_its_neighbours():
    with pytest.raises(DataError, match=r"data.columns.prompt names the column 'qestion'.*Did you mean 'question'"):
        resolve_columns(ColumnMapping(prompt="qestion"), STREAM)
    with pytest.raises(DataError, match=r"columns.images names the column 'pic'"):
        resolve_columns(ColumnMapping(images=("image", "pic")), STREAM)
    with pytest.raises(DataError, match=r"no column that holds answers.*Its columns: image, page"):
        resolve_columns(ColumnMapping(), replace(STREAM, columns=("image", "page")))


def test_all_columns_are_checked_before_any_row(write_jsonl, prepare):
    good, bad = write_jsonl([{"text": "a"}] * 3, "a.jsonl"), write_jsonl([{"words": "a"}], "b.jsonl")
    with pytest.raises(DataError, match=r"sources\[1\]/b.jsonl"):
        prepare(sources=[{"path": str(good)}, {"path": str(bad)}])


def test_known_names_are_found():
    row = mapped({"id": 7, "group": "g", "image": b"x", "question": "Why?", "text": "So.", "page": 3, "blob": b"y"})
    assert (row.id, row.group, row.images, row.metadata) == ("7", "g", [b"x"], {"page": 3})
    assert [message["role"] for message in row.messages] == ["user", "assistant"]
    assert row.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Why?"}]


def test_defaults_fill_what_a_row_lacks():
    row = mapped({"text": "a", "image": None, "prompt": ""}, prompt="Read.", system="Be brief.")
    assert row.messages[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert row.messages[1]["content"] == [{"type": "text", "text": "Read."}]
    own = mapped({"text": "a", "voice": "Shout."}, columns={"system": "voice"}, system="Be brief.")
    assert own.messages[0]["content"][0]["text"] == "Shout."
    ready = mapped(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, system="Be brief."
    )
    assert [message["role"] for message in ready.messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (12, "12"),
        (2.5, "2.5"),
        (decimal.Decimal("1.10"), "1.10"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (" a ", " a "),
        ({"b": "é"}, '{"b": "é"}'),
    ],
)
def test_answers_become_words(value, words):
    assert mapped({"text": value}).messages[-1]["content"][0]["text"] == words


@pytest.mark.parametrize("value", [None, "", "  ", float("nan"), [], [None, ""]])
def test_a_row_without_an_answer_is_refused(value):
    with pytest.raises(RowError) as caught:
        mapped({"text": value})
    assert caught.value.reason == "empty_answer"


def test_of_several_answers_the_most_frequent_is_learnt_and_all_are_kept():
    row = mapped({"answers": ["red", {"answer": "blue"}, "green", "blue"]})
    assert row.messages[-1]["content"][0]["text"] == "blue"
    assert row.metadata["answers"] == ["red", "blue", "green", "blue"]
    row = mapped({"answers": ["", 7, "seven"]})
    assert (row.messages[-1]["content"][0]["text"], row.metadata) == ("7", {"answers": ["7", "seven"]})
    row = mapped({"answers": [{"answer": "yes", "confidence": 1}, {"answer": "no", "confidence": 0}]})
    assert row.metadata["answers"] == ["yes", "no"]


@pytest.mark.parametrize(
    ("value", "references"),
    [
        (["7", 7.5, None], ["7", "7.5"]),
        ('["a", "b"]', ["a", "b"]),
        ("[sic]", ["[sic]"]),
        ("one", ["one"]),
        (None, None),
    ],
)
def test_a_column_of_references_stands_beside_the_answer(value, references):
    row = mapped({"text": "a", "accepted": value}, columns={"references": "accepted"})
    assert row.messages[-1]["content"][0]["text"] == "a"
    assert row.metadata == ({} if references is None else {"answers": references})
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = mapped({"messages": talk, "accepted": value}, columns={"references": "accepted"})
    assert row.metadata.get("answers") == references


def test_images_come_from_several_columns_lists_and_csv_lists():
    row = mapped(
        {"text": "a", "front": b"1", "back": [b"2", None, b"3"], "more": '["4.png"]'},
        columns={"images": ("front", "back", "more")},
    )
    assert row.images == [b"1", b"2", b"3", "4.png"]
    assert row.messages[0]["content"].count({"type": "image"}) == 4
    assert mapped({"text": "a", "image": {"bytes": None, "path": ""}}).images == []
    assert mapped({"text": "a", "image": b"1"}, columns={"images": ()}).images == []
    with pytest.raises(RowError) as caught:
        mapped({"text": "a", "image": "[broken"})
    assert caught.value.reason == "image_list"


def test_metadata_keeps_plain_values():
    row = mapped(
        {
            "text": "a",
            "when": datetime.datetime(2026, 1, 2, 3),
            "score": float("inf"),
            "ok": True,
            "list": [1],
            "none": None,
        }
    )
    assert row.metadata == {"when": "2026-01-02 03:00:00", "score": None, "ok": True, "none": None}
