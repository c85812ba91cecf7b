"""Rows and files that somebody made to do harm: each is one error or one line of the ledger, and nothing is reached by it."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.hostile import encoded
from vlm.config.data import SourceConfig
from vlm.data import readers, sample, texts, video
from vlm.data.fingerprint import source_digest
from vlm.data.locations import leads_outside
from vlm.data.sources import open_streams
from vlm.errors import DataError


def reasons(prepared):
    return [entry["reason"] for entry in prepared.ledger]


@pytest.fixture
def linked(tmp_path, make_png, write_jsonl):
    """A folder with links to a picture outside, to a folder outside, and to one of its own."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret.png").write_bytes(make_png(7))
    path = write_jsonl([], "set/rows.jsonl")
    (path.parent / "own").mkdir()
    (path.parent / "own" / "a.png").write_bytes(make_png(1))
    for name, target in (
        ("secret.png", "../private/secret.png"),
        ("there", "../private"),
        ("own-link", "own"),
        ("up", "."),
        ("own.png", "own/a.png"),
    ):
        (path.parent / name).symlink_to(target)
    names = (
        "own.png",
        "own-link/a.png",
        "up/up/own/a.png",
        "secret.png",
        "there/secret.png",
        "own/../there/secret.png",
    )
    path.write_text("".join(json.dumps({"id": name, "image": name, "text": "x"}) + "\n" for name in names))
    return path


def test_links_do_not_lead_out_of_the_folder(linked, prepare):
    for source in (linked, linked.parent):
        prepared = prepare(source)
        assert list(prepared.all_rows()) == ["own.png", "own-link/a.png", "up/up/own/a.png"]
        assert reasons(prepared) == ["image_outside", "image_outside", "image_outside"]
        assert "data.follow_links" in prepared.ledger[0]["message"]
        assert len(prepare(source, follow_links=True).all_rows()) == 6


def test_what_links_lead_to_counts_where_it_may_be_read(linked, make_png):
    def digests(**options):
        return [source_digest(SourceConfig(path=str(path)), **options) for path in (linked, linked.parent)]

    before, followed = digests(), digests(follow_links=True)
    (linked.parents[1] / "private" / "secret.png").write_bytes(make_png(8))
    assert digests() == before
    assert all(new != old for new, old in zip(digests(follow_links=True), followed, strict=True))
    (linked.parent / "own" / "a.png").write_bytes(make_png(9))
    assert all(new != old for new, old in zip(digests(), before, strict=True))


def test_a_snapshot_of_the_hubs_cache_is_one_place(tmp_path, make_png):
    home = tmp_path / "datasets--some--set"
    snapshot = home / "snapshots" / ("0" * 40)
    for folder in (home / "blobs", snapshot / "images"):
        folder.mkdir(parents=True)
    (home / "blobs" / "abc").write_bytes(make_png())
    (home / "refs").write_text("x")
    (snapshot / "images" / "a.png").symlink_to("../../../blobs/abc")
    (snapshot / "images" / "b.png").symlink_to("../../../refs")
    assert not leads_outside(str(snapshot / "images" / "a.png"), str(snapshot))
    assert leads_outside(str(snapshot / "images" / "b.png"), str(snapshot))


def test_pipes_and_odd_names_do_not_stop_anything(tmp_path, write_jsonl, prepare):
    names = ["pipe.png", "folder.png", "a\0.png", "x" * 300 + ".png", "..%2f..%2fetc%2fa.png", "file://../../a.png",
             "file:/etc/a.png", "FILE:///etc/a.png", "\\\\host\\a.png", "zip://a.png::http://127.0.0.1/a.zip"]  # fmt: skip
    path = write_jsonl([{"image": name, "text": "x"} for name in names] + [{"text": "good"}], "set/rows.jsonl")
    os.mkfifo(path.parent / "pipe.png")
    (path.parent / "folder.png").mkdir()
    assert reasons(prepare(path)) == [
        "image_unreadable", "image_unreadable", "image_unreadable", "image_unreadable", "image_not_found", "image_outside",
        "image_not_found", "image_url", "image_not_found", "image_url",
    ]  # fmt: skip
    source_digest(SourceConfig(path=str(path)))
    source_digest(SourceConfig(path=str(path.parent)))


def test_names_on_disk_need_not_be_utf8(tmp_path, write_jsonl, prepare):
    path = write_jsonl([{"text": "x"}], "set/rows.jsonl")
    os.rename(path, os.fsencode(path.parent) + b"/r\xff.jsonl")
    assert list(prepare(path.parent).all_rows()) == ["r\\udcff.jsonl#0"]
    source_digest(SourceConfig(path=str(path.parent)), cache_dir=tmp_path / "cache")


def test_half_characters_and_deep_json_are_in_the_ledger(write_jsonl, prepare):
    rows = [
        {"text": "a\ud800"},
        {"text": "a", "id": "\udfff"},
        {"text": "a", "group": "\ud800"},
        {"text": "a", "page": "\ud800"},
        {"text": "a", "image": "[" * 5000},
        {"text": "a", "image": "[1, 2]"},
        {"text": ["a", "\ud800"]},
        {"text": "good", "page": float("nan"), "count": 10**4000},
    ]
    prepared = prepare(write_jsonl(rows))
    assert reasons(prepared) == [*["bad_unicode"] * 4, "image_list", "image_type", "bad_unicode"]
    assert len(prepared.all_rows()) == 1


def test_a_column_name_with_half_a_character(tmp_path, prepare):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "\\ud800": 1}\n{"text": "b"}\n')
    with pytest.raises(DataError, match="2 x bad_unicode"):
        prepare(tmp_path / "rows.jsonl")


def test_a_line_without_end_is_one_lost_row(tmp_path, prepare, monkeypatch):
    monkeypatch.setattr(texts, "MAX_LINE_BYTES", 1000)
    good = b'{"text": "a"}\n'
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(good + b'{"text": "' + b"a" * 5_000_000 + b'"}\n' + good))
    prepared = prepare(tmp_path / "rows.jsonl.gz")
    assert (reasons(prepared), len(prepared.all_rows())) == (["row_too_large"], 2)
    (tmp_path / "rows.csv").write_text("text\n" + "a" * 2000 + "\n")
    with pytest.raises(DataError, match="has a line of over"):
        prepare(tmp_path / "rows.csv")


def test_long_texts_are_dropped_before_they_are_tokenised(write_jsonl, prepare, processing, monkeypatch):
    monkeypatch.setattr(sample, "_LONGEST_TOKEN", 2)
    tokenised = []
    encode = processing.encode
    monkeypatch.setattr(processing, "encode", lambda *args: tokenised.append(1) or encode(*args))
    prepared = prepare(write_jsonl([{"text": "a" * 200_000}, {"text": "a"}]), max_length_tokens=100)
    assert (reasons(prepared), len(tokenised)) == (["too_long"], 1)


def test_arrays_that_point_outside_their_buffers_are_refused(tmp_path, prepare):
    schema = pa.schema([("text", pa.string())])
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(["abcdefgh", "x"])], schema=schema))
    data = (tmp_path / "rows.arrow").read_bytes()
    assert data.count(struct.pack("<iii", 0, 8, 9)) == 1
    (tmp_path / "rows.arrow").write_bytes(
        data.replace(struct.pack("<iii", 0, 8, 9), struct.pack("<iii", 0, 1 << 30, 9))
    )
    with pytest.raises(DataError, match=r"rows.arrow' cannot be read as arrow.*offset"):
        prepare(tmp_path / "rows.arrow")


class Payload:
    """What a pickle runs when it is opened."""

    def __reduce__(self):
        return (Path.touch, (Path(os.environ["HOSTILE_MARK"]),))


def test_pickled_extension_types_are_not_opened(tmp_path, prepare, monkeypatch):
    mark = tmp_path / "mark"
    monkeypatch.setenv("HOSTILE_MARK", str(mark))
    packed = pickle.dumps(Payload())
    pickle.loads(packed)  # noqa: S301 - the payload works
    assert mark.exists()
    mark.unlink()
    for name in (b"arrow.py_extension_type", b"datasets.features.features.Array2DExtensionType"):
        field = pa.field(
            "page", pa.string(), metadata={b"ARROW:extension:name": name, b"ARROW:extension:metadata": packed}
        )
        schema = pa.schema([("text", pa.string()), field])
        table = pa.table([pa.array(["a"]), pa.array(["b"])], schema=schema)
        with pa.ipc.new_file(str(tmp_path / "rows.arrow"), schema) as writer:
            writer.write_table(table)
        pq.write_table(table, tmp_path / "rows.parquet")
        for path in (tmp_path / "rows.arrow", tmp_path / "rows.parquet"):
            if name == b"arrow.py_extension_type":
                assert len(prepare(path).all_rows()) == 1
                continue
            # Where `datasets` has been imported, it knows its own type and refuses what is no JSON.
            with contextlib.suppress(DataError):
                prepare(path)
    assert not mark.exists()


def test_one_value_that_stands_in_every_row_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_MAX_REPEATED_BYTES", 1 << 20)
    large = "a" * 300_000
    table = pa.table({"text": pa.array([large] * 1000).dictionary_encode()})
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    pq.write_table(table, tmp_path / "rows.parquet")
    seen = []
    with_labels = readers._with_labels
    monkeypatch.setattr(
        readers, "_with_labels", lambda batch, labels: seen.append(batch.num_rows) or with_labels(batch, labels)
    )
    for name, most in (("rows.arrow", 3), ("rows.parquet", 4)):
        (stream,) = open_streams((SourceConfig(path=str(tmp_path / name)),))
        rows = stream.rows()
        assert next(rows)["text"] == large
        assert max(seen) <= most


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"text,id,text\na,1,b\n", "two columns named 'text'"),
        ("rows.jsonl.gz", b"no gzip", "cannot be read as jsonl"),
        ("rows.jsonl.xz", b"\xfd7zXZ\x00 no more", "cannot be read as jsonl"),
        ("rows.zip", b"PK\x03\x04 no zip", "is no zip archive"),
        ("rows.parquet", b"PAR1" * 5, "cannot be read as parquet"),
        ("rows.arrow", b"ARROW1\0\0" + b"\xff" * 40, "cannot be read as arrow"),
    ],
)
def test_damaged_files_are_one_error(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_streams((SourceConfig(path=str(tmp_path / name)),))


def test_damaged_notes_of_saved_datasets_are_one_error(tmp_path):
    for name, content in (("dataset_dict.json", "[" * 5000), ("dataset_dict.json", '{"splits": 3}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match="Save it again with save_to_disk"):
            open_streams((SourceConfig(path=str(tmp_path)),))
    schema = pa.schema([("text", pa.string())], metadata={"huggingface": '{"info": {"features": 7}}'})
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), schema) as writer:
        writer.write_table(pa.table({"text": ["a"]}, schema=schema))
    (stream,) = open_streams((SourceConfig(path=str(tmp_path / "rows.arrow")),))
    with pytest.raises(DataError, match=r"features .* are damaged"):
        next(stream.rows())


@pytest.mark.parametrize("path", ["reference://x.json", "simplecache::reference://x.json", "reference://::/tmp/x.json"])
def test_files_that_name_other_files_are_no_source(path):
    with pytest.raises(DataError, match="reads what its content names"):
        open_streams((SourceConfig(path=path),))


def test_a_row_of_many_large_images_is_not_decoded(write_parquet, prepare):
    large = encoded(Image.new("L", (300, 300)), "PNG")
    rows = [{"images": [large] * count, "text": "x"} for count in (8, 9)]
    assert reasons(prepare(write_parquet(rows), max_source_pixels=90_000)) == ["images_too_many_pixels"]


def animation(file_format, sizes, **options):
    frames = [Image.new("P" if file_format == "GIF" else "RGB", size, number) for number, size in enumerate(sizes)]
    return encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)


def load_frames(data, max_frames=16):
    return video.load_video(
        video.VideoReference(data, None),
        load=lambda value: value,
        list_folder=lambda path: [],
        max_frames=max_frames,
        max_source_pixels=10_000,
        max_pixels=None,
        max_total_pixels=80_000,
    )


def reason_of(call):
    with pytest.raises(video.RowError) as caught:
        call()
    return caught.value.reason


def test_later_frames_are_checked_like_the_first():
    grown = animation("TIFF", [(8, 8), (3000, 3000)], compression="tiff_deflate")
    assert reason_of(lambda: load_frames(grown)) == "image_too_many_pixels"
    gif = bytearray(animation("GIF", [(8, 8)] * 3, disposal=2))
    second = [place for place in range(len(gif)) if gif[place] == 0x2C][-1]
    gif[second + 5 : second + 9] = struct.pack("<HH", 3000, 3000)
    assert reason_of(lambda: load_frames(bytes(gif))) in ("image_too_many_pixels", "image_damaged")
    assert reason_of(lambda: load_frames(animation("TIFF", [(100, 100)] * 9))) == "images_too_many_pixels"
    assert len(load_frames(animation("TIFF", [(100, 100)] * 8)).frames) == 8


def test_long_animations_are_not_decoded_for_ever(monkeypatch):
    monkeypatch.setattr(video, "_MAX_DECODED", 3)
    data = animation("TIFF", [(100, 100)] * 4)
    assert reason_of(lambda: load_frames(data, max_frames=2)) == "video_too_many_pixels"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_number_are_in_the_ledger(value, write_parquet, prepare):
    pixels = np.full((40, 40), 0.5, np.float32)
    pixels[3, 4] = value
    rows = [{"image": encoded(Image.fromarray(pixels), "TIFF"), "text": "x"}, {"text": "x"}]
    prepared = prepare(write_parquet(rows))
    assert reasons(prepared) == ["image_not_finite"]
    assert "1 of the image's 1600 pixels" in prepared.ledger[0]["message"]


def test_files_that_are_two_things_are_the_image_their_start_says(make_png, write_parquet, prepare):
    """What is behind the image, such as an archive or a script, is not read; what is before it makes it no image."""
    png = make_png()
    rows = [{"image": data, "text": "x"} for data in (png + b"PK\x03\x04<script>", b"%PDF-1.7\n" + png, b"MZ" + png)]
    prepared = prepare(write_parquet(rows))
    assert reasons(prepared) == ["image_format", "image_format"]
    np.testing.assert_array_equal(
        prepared.split("train")[0].images[0],
        prepare(write_parquet([{"image": png, "text": "x"}])).split("train")[0].images[0],
    )


def test_secrets_of_addresses_are_not_in_the_ledger(write_jsonl, prepare, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "value-of-the-token")
    addresses = [
        "https://user:hunter2@host/a.png",
        "s3://b/a.png?X-Amz-Signature=hunter2",
        "http://h/value-of-the-token.png",
    ]
    prepared = prepare(write_jsonl([{"image": address, "text": "x"} for address in addresses] + [{"text": "x"}]))
    assert reasons(prepared) == ["image_url"] * 3
    text = (prepared.folder / "ledger.jsonl").read_text()
    assert "hunter2" not in text
    assert "value-of-the-token" not in text
    assert "https://***@host/a.png" in text
