"""Nothing is lost without an entry, memory is bounded, and the bytes do not depend on the number of workers."""

from __future__ import annotations

import hashlib
import io
import math
import threading

import numpy as np
import pytest
from PIL import Image

from vlm.data import prepare as module
from vlm.data import sample, sink, storage, threads
from vlm.data.prepare import prepare_dataset
from vlm.data.splits import SPLITS
from vlm.errors import DataError


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_ledger_adds_up(make_rows, write_parquet, prepare):
    rows = make_rows(30)
    rows[3]["text"] = ""
    rows[5]["image"] = rows[5]["image"][:60]
    rows[7]["image"] = b"no image"
    rows[8]["id"] = "row-0"
    prepared = prepare(write_parquet(rows))
    assert [(entry["row"], entry["id"], entry["action"], entry["reason"]) for entry in prepared.ledger] == [
        (3, "row-3", "dropped", "empty_answer"),
        (5, "row-5", "dropped", "image_truncated"),
        (7, "row-7", "dropped", "image_format"),
        (8, "row-0", "warning", "duplicate_id"),
    ]
    assert all(entry["source"] == "rows.parquet" and entry["message"] for entry in prepared.ledger)
    summary = prepared.summary
    assert (summary.num_rows_in, summary.num_dropped, sum(summary.num_rows.values())) == (30, 3, 27)
    assert summary.ledger["dropped"] == {"empty_answer": 1, "image_truncated": 1, "image_format": 1}
    ids = prepared.split("train").ids
    assert len(set(ids)) == len(ids) == 27
    assert "row-0#8" in ids


def test_the_summary_counts_what_was_written(make_rows, write_parquet, prepare):
    prepared = prepare(sources=[{"path": str(write_parquet(make_rows(40)))}])
    for split in SPLITS:
        dataset, totals = prepared.split(split), prepared.summary.splits[split]
        assert len(dataset) == totals.num_rows == prepared.summary.num_rows[split]
        assert totals.num_tokens == dataset.num_tokens.sum()
        assert totals.num_visual_tokens == dataset.num_visual_tokens.sum()
        assert totals.num_supervised_tokens == dataset.num_supervised_tokens.sum()
        assert totals.num_images == dataset.num_images.sum()
        if len(dataset):
            assert totals.longest_tokens == dataset.num_tokens.max()
            assert totals.longest_id == dataset.ids[int(dataset.num_tokens.argmax())]


def test_bytes_do_not_depend_on_the_number_of_workers(make_rows, write_parquet, prepare, monkeypatch):
    monkeypatch.setattr(storage, "BATCH_SIZE_BYTES", 20_000)
    monkeypatch.setattr(storage, "SHARD_SIZE_BYTES", 60_000)
    rows = make_rows(60)
    rows[11]["image"] = b"broken"
    path = write_parquet(rows)
    trees = [tree(prepare(sources=[{"path": str(path)}], num_workers=workers).folder) for workers in (0, 1, 4)]
    assert trees[0] == trees[1] == trees[2]
    assert "train/data-00001.arrow" in trees[0]


@pytest.mark.parametrize(("limit_bytes", "handed_over"), [(0, 120), (1 << 15, 24)])
def test_small_rows_are_not_handed_over(
    make_rows, write_parquet, prepare, processing, monkeypatch, limit_bytes, handed_over
):
    """All but those of the first chunks, which tell that rows are small; the bytes stay the same."""
    monkeypatch.setattr(threads, "_CHUNK_MAX_ROWS", 4)
    path = write_parquet(make_rows(120))
    expected = tree(prepare(path).folder)
    monkeypatch.setattr(threads, "_SMALL_ROW_BYTES", limit_bytes)
    used = []
    resize = type(processing).resize_image

    def noting(self, image, size):
        used.append(threading.current_thread())
        return resize(self, image, size)

    monkeypatch.setattr(type(processing), "resize_image", noting)
    assert tree(prepare(path, num_workers=2).folder) == expected
    assert len(used) == 120
    assert sum(thread is not threading.main_thread() for thread in used) == handed_over


def test_few_decoded_images_wait_for_each_other(make_rows, write_parquet, prepare, processing, monkeypatch):
    """Rows take each stage together only until their pixels reach a bound."""
    rows = make_rows(40)
    pixels = [math.prod(Image.open(io.BytesIO(row["image"])).size) for row in rows]
    waiting, most = [], []
    encode, target_size = type(processing).encode, type(processing).target_size

    def noting_size(self, height, width, **limits):
        waiting.append(height * width)
        most.append(sum(waiting))
        return target_size(self, height, width, **limits)

    def noting_encode(self, *args):
        waiting.clear()
        return encode(self, *args)

    monkeypatch.setattr(type(processing), "target_size", noting_size)
    monkeypatch.setattr(type(processing), "encode", noting_encode)
    monkeypatch.setattr(sample, "_PIXELS_AT_A_TIME", 10_000)
    prepared = prepare(write_parquet(rows))
    assert prepared.summary.num_rows_in == 40
    assert 10_000 <= max(most) < 10_000 + max(pixels)


def test_groups_are_not_torn(make_rows, write_parquet, prepare):
    prepared = prepare(
        sources=[{"path": str(write_parquet(make_rows(90)))}], split={"test_fraction": 0.3, "validation_fraction": 0.2}
    )
    groups = [{row.group for row in prepared.split(split)} for split in SPLITS]
    assert all(groups)
    assert sum(map(len, groups)) == len(set.union(*groups)) == 30


def test_a_group_in_two_given_splits_is_told(make_rows, write_parquet, prepare):
    rows = make_rows(6)
    train, test = write_parquet(rows[:4], "train.parquet"), write_parquet(rows[4:], "test.parquet")
    prepared = prepare(sources=[{"path": str(train)}, {"path": str(test)}])
    assert prepared.summary.num_rows == {"train": 4, "validation": 0, "test": 2}
    assert prepared.summary.ledger == {"warning": {"leak": 1}}
    assert prepared.ledger[0]["details"] == {"group": "group-1", "splits": ["train", "test"]}
    assert prepared.ledger[0]["source"] == "sources[1]/test.parquet"


def test_too_many_dropped_rows_fail_with_their_reasons(make_rows, write_parquet, prepare):
    rows = make_rows(10)
    for row in rows[:2]:
        row["image"] = b"broken"
    path = write_parquet(rows)
    with pytest.raises(
        DataError,
        match=r"2 of 10 rows.*max_dropped_fraction 0.1: 2 x image_format. First: rows.parquet row 0 \(id 'row-0'\)",
    ):
        prepare(path, max_dropped_fraction=0.1)
    assert prepare(path, max_dropped_fraction=0.2).summary.num_dropped == 2


def test_when_all_rows_are_bad_it_stops_early(write_jsonl, prepare, monkeypatch):
    monkeypatch.setattr(sink, "_ALL_DROPPED_AFTER", 20)
    path = write_jsonl([{"text": "", "id": str(number)} for number in range(500)])
    with pytest.raises(DataError, match="each of the first 20 rows"):
        prepare(path)
    with pytest.raises(DataError, match="3 of 3 rows had to be dropped"):
        prepare(write_jsonl([{"text": ""}] * 3))
    with pytest.raises(DataError, match="hold no row"):
        prepare(_header_only(path))


def _header_only(path):
    other = path.with_suffix(".csv")
    other.write_text("text,id\n")
    return other


def test_an_empty_required_split_is_an_error(make_rows, write_parquet, prepare):
    path = write_parquet(make_rows(4))
    with pytest.raises(
        DataError, match=r"the test split is empty \(rows: train 4, validation 0, test 0\).*data.split.test_fraction"
    ):
        prepare(path, required_splits=("train", "test"))
    with pytest.raises(DataError, match="the train split is empty"):
        prepare(sources=[{"path": str(path), "split": "test"}], required_splits=("train",))


def big_rows(encode_image, count=3):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (280, 560, 3), dtype=np.uint8))
    return [
        {"id": str(number), "image": encode_image(image), "text": "a" * (10 if number else 300)}
        for number in range(count)
    ]


def test_too_long_conversations_are_dropped(encode_image, write_parquet, prepare):
    prepared = prepare(write_parquet(big_rows(encode_image)), max_length_tokens=300)
    assert prepared.reasons == [("dropped", "too_long")]
    details = prepared.ledger[0]["details"]
    assert details == {"limit_tokens": 300, "num_tokens_before": 537, "image_sizes_before": [[280, 560]]}
    assert prepared.summary.limit_tokens == 300


def test_images_are_shrunk_until_the_conversation_fits(encode_image, write_parquet, prepare, processing):
    path = write_parquet(big_rows(encode_image))
    prepared = prepare(path, max_length_tokens=400, on_too_long="shrink_images")
    assert prepared.reasons == [("shrunk", "too_long")]
    details = prepared.ledger[0]["details"]
    row = prepared.split("train")[0]
    assert len(row.input_ids) == details["num_tokens_after"] <= 400
    # One step larger would no longer fit: nothing is shrunk more than it must be.
    assert details["num_tokens_after"] > 400 - 20
    assert [list(image.shape[:2]) for image in row.images] == details["image_sizes_after"]
    hopeless = prepare(path, max_length_tokens=200, on_too_long="shrink_images")
    assert hopeless.reasons == [("dropped", "too_long"), ("shrunk", "too_long"), ("shrunk", "too_long")]


def test_the_context_length_is_the_limit_if_none_is_set(encode_image, write_parquet, prepare, processing):
    processing.context_length_tokens = 300
    assert prepare(write_parquet(big_rows(encode_image))).reasons == [("dropped", "too_long")]
    processing.context_length_tokens = None
    assert prepare(write_parquet(big_rows(encode_image))).summary.limit_tokens is None


def test_pixel_limits_reach_the_model_size(encode_image, write_parquet, prepare):
    small = prepare(write_parquet(big_rows(encode_image)), max_pixels=20_000).split("train")[1]
    assert small.images[0].shape[0] * small.images[0].shape[1] <= 20_000
    large = prepare(write_parquet(big_rows(encode_image)), min_pixels=300_000).split("train")[1]
    assert large.images[0].shape[0] * large.images[0].shape[1] >= 300_000


def test_rows_the_model_cannot_take_are_dropped(make_rows, write_parquet, prepare, processing, monkeypatch):
    def refuse(*args, **options):
        raise DataError("no place for an image")

    monkeypatch.setattr(processing, "encode", refuse)
    path = write_parquet([*make_rows(1), {**make_rows(1)[0], "text": "x"}])
    with pytest.raises(DataError, match=r"2 x not_encodable.*no place for an image"):
        prepare(path)


def test_a_bug_in_a_worker_is_not_swallowed(make_rows, write_parquet, prepare, processing, monkeypatch):
    def broken(*args, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(processing, "target_size", broken)
    with pytest.raises(ZeroDivisionError):
        prepare(write_parquet(make_rows(50)), num_workers=2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prepare")]


@pytest.mark.parametrize("num_rows", [300, 900])
def test_rows_in_flight_do_not_grow_with_the_dataset(num_rows, make_png, processing, tmp_path, monkeypatch):
    """Counts rows read but not yet written, with slow writing: the reader must wait."""
    from vlm.config.data import DataConfig

    image = make_png()
    reading = writing = most = 0

    def rows():
        nonlocal reading, most
        for number in range(num_rows):
            reading += 1
            most = max(most, reading - writing)
            yield {"id": str(number), "text": "a", "image": image * 1 + bytes(300_000)}

    take = sink.Sink.take

    def counted(self, *row):
        nonlocal writing
        writing += 1
        take(self, *row)

    stream = module.RowStream(0, "rows", "train", ("id", "text", "image"), None, rows)
    monkeypatch.setattr(module, "open_streams", lambda sources, follow_links: [stream])
    monkeypatch.setattr(sink.Sink, "take", counted)
    summary = prepare_dataset(DataConfig(), processing, tmp_path, num_workers=2)
    assert summary.num_rows["train"] == num_rows
    # Large rows travel singly: 2 * 2 + 2 in the window, and one in each hand.
    assert most <= 8


def test_text_only_and_image_rows_mix(make_png, write_parquet, prepare):
    rows = [{"id": "a", "image": make_png(), "text": "x"}, {"id": "b", "image": None, "text": "y"}]
    found = prepare(write_parquet(rows)).all_rows()
    assert [len(found[name].images) for name in "ab"] == [1, 0]
    assert found["b"].messages[0]["content"] == [{"type": "text", "text": "Transcribe the text in the image."}]


def test_messages_with_several_images(make_image, encode_image, write_jsonl, prepare, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encode_image(make_image(3)))
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image", "image": "b.png"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "same"}]
    row = prepare(write_jsonl([{"messages": messages, "image": "a.png"}])).split("train")[0]
    assert row.id == "rows.jsonl#0"
    assert len(row.images) == 2
    np.testing.assert_array_equal(row.images[0], row.images[1])


def test_paths_out_of_the_folder_and_addresses_are_dropped(make_png, write_jsonl, prepare, tmp_path):
    (tmp_path / "secret.png").write_bytes(make_png())
    rows = [
        {"text": "a", "image": path}
        for path in ("../secret.png", str(tmp_path / "secret.png"), "http://127.0.0.1/a.png")
    ]
    rows.append({"text": "a", "image": None})
    assert [entry["reason"] for entry in prepare(write_jsonl(rows, "set/rows.jsonl")).ledger] == [
        "image_outside",
        "image_outside",
        "image_url",
    ]


def test_real_receipts(shared_data, prepare, processing):
    import pyarrow.parquet as pq

    prepared = prepare(sources=[{"path": str(shared_data / "sroie_kie")}], num_workers=2, max_dropped_fraction=0)
    assert prepared.summary.num_rows == {"train": 40, "validation": 10, "test": 20}
    assert prepared.summary.ledger == {}
    for row, source in zip(
        prepared.split("validation"),
        pq.read_table(shared_data / "sroie_kie" / "validation.parquet").to_pylist(),
        strict=True,
    ):
        image = Image.open(io.BytesIO(source["image"]["bytes"])).convert("RGB")
        np.testing.assert_array_equal(
            row.images[0], processing.resize_image(image, processing.target_size(image.height, image.width))
        )
        assert (row.id, row.target, row.metadata["width"]) == (source["id"], source["text"], source["width"])


def test_surrogates_and_odd_characters_survive(write_jsonl, prepare):
    rows = [{"text": "a\u2028b \U0001f600", "id": "é"}, {"text": "", "id": "\ud800"}]
    prepared = prepare(write_jsonl(rows))
    assert prepared.split("train")[0].target == "a\u2028b \U0001f600"
    assert prepared.summary.num_dropped == 1
