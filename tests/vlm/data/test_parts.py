"""However the rows are cut and whoever prepares them, the bytes are those of one process."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import threading
import uuid
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.vlm.data.test_sources import FORMATS, write_source
from vlm.config.data import DataConfig
from vlm.data import exchange, parts, readers, sink, storage
from vlm.data.exchange import StoppedError
from vlm.data.parts import Part, PartResult, prepare_in_parts, prepare_part
from vlm.data.ranges import PartSize
from vlm.data.sources import open_streams
from vlm.errors import DataError, ResourceError


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def in_parts(tmp_path_factory, processing, monkeypatch):
    """Prepares in parts of a few rows, each sent through bytes as to another process; gives the folder."""
    monkeypatch.setattr(parts, "_FIRST_ROWS", 2)
    monkeypatch.setattr(parts, "_MOST_ROWS", 5)

    def run(path=None, *, address=None, run_parts=None, required_splits=(), max_pieces=100, **settings):
        folder = tmp_path_factory.mktemp("parted")
        for name in ("processor", "scratch", "dataset"):
            (folder / name).mkdir()
        (folder / "processor" / "config.json").write_text("{}")
        if path is not None:
            settings.setdefault("sources", [{"path": str(path), "split": "train"}])
        data = DataConfig.model_validate({"max_dropped_fraction": 1.0, **settings})
        prepare_in_parts(
            data,
            folder / "processor",
            folder / "dataset",
            run_parts or partial(map, through_bytes(processing)),
            exchange=str(folder / "exchange") if address is None else address,
            scratch=folder / "scratch",
            required_splits=required_splits,
            max_pieces=max_pieces,
        )
        if address is None:
            assert list((folder / "exchange").iterdir()) == []
        assert list((folder / "scratch").iterdir()) == []
        return folder / "dataset"

    return run


def through_bytes(processing):
    def open_processing(folder: Path):
        assert (folder / "config.json").read_text() == "{}"
        return processing

    return lambda part: sent(prepare_part(sent(part), open_processing))


def sent(value):
    return pickle.loads(pickle.dumps(value))  # noqa: S301


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_bytes(kind, folder_address, make_rows, prepare, in_parts):
    path = write_source(folder_address, kind, make_rows(23))
    assert tree(in_parts(path)) == tree(prepare(path).folder)


def odd_rows(make_rows, count=90):
    """Rows with all that names, splits and the ledger depend on."""
    rows = make_rows(count)
    for number in (3, 40):
        rows[number]["text"] = ""
    rows[5]["image"] = rows[5]["image"][:60]
    rows[7]["image"] = b"no image"
    for number in (8, 44, 45, 80):
        rows[number]["id"] = "row-0"
    rows[9]["id"] = "row-0#8"
    rows[11]["text"] = "a" * 500
    rows[12]["id"] = "\ud800"
    rows[13] |= {"text": "", "id": "\ud800x"}
    rows[14]["text"] = "a\u2028b \U0001f600"
    rows[15]["image"] = None
    return rows


def test_names_splits_and_ledger_are_those_of_one_process(make_rows, prepare, in_parts, tmp_path, monkeypatch):
    """JSON lines with odd rows, blank and broken lines; a second source with groups of the first, of which a part is taken."""
    import base64

    monkeypatch.setattr(storage, "BATCH_SIZE_BYTES", 20_000)
    monkeypatch.setattr(storage, "SHARD_SIZE_BYTES", 60_000)
    lines = []
    for row in odd_rows(make_rows):
        image = row["image"] and "data:image/png;base64," + base64.b64encode(row["image"]).decode()
        lines.append(json.dumps(row | {"image": image}).encode())
    lines[20:20] = [b"", b"{", b"[1]", b"   ", b"\xef\xbb\xbf" + lines[21]]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b"\n\n".join(lines[:50])))
    table = pa.Table.from_pylist([{**row, "id": f"other-{n}"} for n, row in enumerate(make_rows(20))])
    for number in range(3):
        pq.write_table(table, tmp_path / f"part-{number}.parquet", row_group_size=7)
    settings = {
        "sources": [
            {"path": str(tmp_path / "rows.jsonl")},
            {"path": str(tmp_path / "part-*.parquet"), "split": "test", "max_rows": 29},
            {"path": str(tmp_path / "rows.jsonl.gz"), "max_rows": 31},
        ],
        "max_length_tokens": 300,
        "on_too_long": "shrink_images",
        "split": {"test_fraction": 0.3, "validation_fraction": 0.2},
    }
    expected = prepare(**settings)
    reasons = {reason for _, reason in expected.reasons}
    assert reasons >= {
        "empty_answer",
        "image_truncated",
        "image_format",
        "duplicate_id",
        "leak",
        "too_long",
        "bad_json",
    }
    assert reasons >= {"bad_unicode"}
    assert "train/data-00001.arrow" in tree(expected.folder)
    assert tree(in_parts(**settings)) == tree(expected.folder)


def test_videos_boxes_and_grey_images(make_image, encode_image, write_jsonl, prepare, in_parts, tmp_path, processing):
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(encode_image(make_image(number, mode="L" if number % 2 else "RGB")))
    film = {"type": "video", "video": [f"{number}.png" for number in range(4)], "fps": 3.0}
    rows = []
    for number in range(9):
        content = [{"type": "text", "text": "x"}, {"type": "image", "image": f"{number % 6}.png"}]
        if number % 3 == 0:
            content.append(film)
        answer = json.dumps({"bbox": [1, 2, 3 + number * 9, 14]})
        rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    path = write_jsonl(rows)
    boxes = {"source": "absolute", "target": "normalized_1000", "on_outside": "clip"}
    expected = prepare(path, boxes=boxes)
    assert expected.summary.num_rows["train"] == 9
    assert ("warning", "box_clipped") in expected.reasons
    assert tree(in_parts(path, boxes=boxes)) == tree(expected.folder)


def test_csv_with_lines_in_cells(tmp_path, prepare, in_parts):
    text = "\ufefftext,id\n" + "".join(
        f'"a\n{number} é\r\n",{number}\n' + ("\n" if number % 4 else "x\n,,,\n") for number in range(30)
    )
    (tmp_path / "rows.csv").write_bytes(text.encode())
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("rows.csv", "rows.csv.gz"):
        expected = prepare(tmp_path / name)
        assert len(expected.ledger) == 16
        assert tree(in_parts(tmp_path / name)) == tree(expected.folder)


def test_the_builtin_rows_and_their_limit(prepare, in_parts):
    for limit in (None, 23):
        settings = {"sources": [{"path": "builtin", "max_rows": limit}]}
        assert tree(in_parts(**settings)) == tree(prepare(**settings).folder)


@pytest.mark.parametrize("max_rows", [None, 5])
def test_hub_datasets_are_divided_by_file(tmp_path, make_rows, prepare, in_parts, monkeypatch, processing, max_rows):
    datasets = pytest.importorskip("datasets")
    for number in range(4):
        pq.write_table(
            pa.Table.from_pylist(make_rows(4 * number + 4)[4 * number :]), tmp_path / f"train-{number}.parquet"
        )
    files = {"train": sorted(map(str, tmp_path.glob("*.parquet"))), "test": str(tmp_path / "train-0.parquet")}
    load = datasets.load_dataset_builder
    monkeypatch.setattr(
        datasets,
        "load_dataset_builder",
        lambda path, **options: load("parquet", data_files=files, cache_dir=str(tmp_path / "cache")),
    )
    monkeypatch.setattr("vlm.data.hub.check_files", lambda name, files: None)
    settings = {"sources": [{"path": "someone/receipts", "max_rows": max_rows}]}
    seen = []

    def run_parts(some):
        for part in some:
            seen.append((part.stream_number, part.rows.at))
            yield through_bytes(processing)(part)

    expected = prepare(**settings)
    assert tree(in_parts(run_parts=run_parts, **settings)) == tree(expected.folder)
    assert seen == ([(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)] if max_rows is None else [(0, 0), (1, 0)])


def test_ranges_of_any_size_hold_every_row_once(tmp_path, make_rows):
    rows = [{"text": str(number)} for number in range(57)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=20)
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), pa.Table.from_pylist(rows).schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows[:0]))
        writer.write_table(pa.Table.from_pylist(rows), max_chunksize=9)
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    (tmp_path / "rows.csv").write_text("text\n" + "\n\n".join(row["text"] for row in rows))
    for path in sorted(tmp_path.iterdir()):
        fs, name = fsspec.core.url_to_fs(str(path))
        for most in (1, 4, 7, 20, 21, 56, 57, 1000):
            for size in (PartSize(most, 1 << 20, 50), PartSize(1000, 10 * most, 50), PartSize(most, 1 << 20, 2)):
                ranges = list(readers.cut_rows(fs, name, path.suffix[1:], size, True))
                read = [list(readers.read_rows(fs, name, path.suffix[1:], part)) for part in ranges]
                assert [row["text"] for part in read for row in part] == [row["text"] for row in rows]
                assert [len(part) for part in read] == [part.num_rows for part in ranges]
                if size.max_rows == most < 57:
                    assert len(ranges) > 1


def test_arrow_files_elsewhere_are_not_fetched_to_be_cut(make_rows):
    fs = fsspec.filesystem("memory")
    path = write_source(f"memory://{uuid.uuid4().hex}", "arrow_file", make_rows(9))
    (stream,) = open_streams(DataConfig.model_validate({"sources": [path]}).sources)
    assert [part.num_rows for part in stream.cut(PartSize(3, 1 << 20), False)] == [None]
    assert [part.num_rows for part in stream.cut(PartSize(4, 1 << 20), True)] == [4, 4, 1]
    fs.rm(path.removeprefix("memory:/").rsplit("/", 1)[0], recursive=True)


def test_parts_go_through_an_address(make_rows, write_parquet, prepare, in_parts):
    """As through a bucket; nothing stays in memory's file system but the folder."""
    fs, name = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    path = write_parquet(make_rows(12))
    assert tree(in_parts(path, address=f"memory:/{name}/tmp/parts")) == tree(prepare(path).folder)
    assert fs.find(name) == []
    fs.rm(name, recursive=True)


def test_limits_act_as_in_one_process(make_rows, write_jsonl, write_parquet, in_parts, monkeypatch):
    monkeypatch.setattr(sink, "_ALL_DROPPED_AFTER", 20)
    with pytest.raises(DataError, match="each of the first 20 rows"):
        in_parts(write_jsonl([{"text": "", "id": str(number)} for number in range(500)]))
    rows = make_rows(10)
    for row in rows[:2]:
        row["image"] = b"broken"
    path = write_parquet(rows)
    with pytest.raises(DataError, match=r"2 of 10 rows.*First: rows.parquet row 0 \(id 'row-0'\)"):
        in_parts(path, max_dropped_fraction=0.1)
    with pytest.raises(DataError, match="the test split is empty"):
        in_parts(path, required_splits=("train", "test"))
    (path.parent / "empty.csv").write_text("text,id\n")
    with pytest.raises(DataError, match="hold no row"):
        in_parts(path.parent / "empty.csv")


def test_damage_in_a_file_is_told_after_the_rows_before_it(write_jsonl, tmp_path, in_parts, processing):
    """And what was cut until then is not lost on the way."""
    (tmp_path / "rows.csv").write_bytes(b"text\n" + b"a\n" * 9 + "café\n".encode("latin-1"))
    seen = []

    def run_parts(some):
        for part in some:
            seen.append(part.number)
            yield through_bytes(processing)(part)

    with pytest.raises(DataError, match="Save it as UTF-8"):
        in_parts(tmp_path / "rows.csv", run_parts=run_parts)
    lines = "".join(json.dumps({"text": hashlib.sha256(b"%d" % number).hexdigest()}) + "\n" for number in range(3000))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-3000])
    seen.clear()
    with pytest.raises(DataError, match="cannot be read as jsonl"):
        in_parts(tmp_path / "rows.jsonl.gz", run_parts=run_parts)
    assert len(seen) > 3


def test_a_file_that_changes_meanwhile_is_refused(write_jsonl, in_parts, processing):
    path = write_jsonl([{"text": "a", "id": str(number)} for number in range(20)])

    def run_parts(some):
        for part in some:
            if part.number == 2:
                write_jsonl([{"text": "a", "id": str(number)} for number in range(19)])
            yield through_bytes(processing)(part)

    with pytest.raises(ResourceError, match=r"sees another file .*give data.sources an address"):
        in_parts(path, run_parts=run_parts)


def one_part(path, address, **settings) -> Part:
    data = DataConfig.model_validate({"sources": [{"path": str(path), "split": "train"}], **settings})
    plan = parts._Plan(open_streams(data.sources), data, str(address), 0, 8)
    return next(plan.parts())


def test_a_host_that_does_not_see_things_says_so(write_jsonl, tmp_path, processing):
    path = write_jsonl([{"text": "a"}])
    part = one_part(path, tmp_path / "elsewhere")
    with pytest.raises(ResourceError, match=r"does not see '.*elsewhere'.*set runtime.store to an address"):
        prepare_part(part, lambda folder: processing)
    (tmp_path / "processor").mkdir()
    with exchange.ExchangeOwner(str(tmp_path / "elsewhere"), tmp_path / "processor", tmp_path):
        path.unlink()
        with pytest.raises(ResourceError, match=r"rows.jsonl'.* does not see it; give data.sources an address"):
            prepare_part(part, lambda folder: processing)


def test_an_image_that_only_the_worker_misses_is_no_dropped_row(make_png, write_jsonl, in_parts, tmp_path, processing):
    (tmp_path / "a.png").write_bytes(make_png())
    path = write_jsonl([{"text": "a", "image": "a.png"}, {"text": "b", "image": "missing.png"}] * 3)

    def run_parts(some):
        for part in some:
            (tmp_path / "a.png").rename(tmp_path / "b.png")
            result = through_bytes(processing)(part)
            (tmp_path / "b.png").rename(tmp_path / "a.png")
            yield result

    with pytest.raises(ResourceError, match=r"does not see the image 'a.png'"):
        in_parts(path, run_parts=run_parts)
    assert in_parts(path).is_dir()


def test_workers_stop_when_nobody_waits(make_rows, write_parquet, tmp_path, processing, monkeypatch):
    (tmp_path / "processor").mkdir()
    monkeypatch.setattr(exchange, "_LOOKED_SECONDS", 0.0)
    part = one_part(write_parquet(make_rows(40)), tmp_path / "exchange")
    owner = exchange.ExchangeOwner(str(tmp_path / "exchange"), tmp_path / "processor", tmp_path)
    resize, calls = type(processing).resize_image, []

    def slow(self, image, size):
        calls.append(size)
        if len(calls) == 5:
            owner.__exit__()
        return resize(self, image, size)

    monkeypatch.setattr(type(processing), "resize_image", slow)
    monkeypatch.setattr("vlm.data.threads._CHUNK_MAX_ROWS", 1)
    with owner, pytest.raises(StoppedError):
        prepare_part(part, lambda folder: processing)
    assert len(calls) < 10


def test_parts_grow_with_the_speed_of_the_rows(write_jsonl):
    path = write_jsonl([{"text": "a"}])
    data = DataConfig.model_validate({"sources": [str(path)]})
    plan = parts._Plan(open_streams(data.sources), data, "", 0, 8)
    sizes = []
    for rows, seconds, size_bytes in ((64, 0.01, 100), (256, 0.1, 100), (1024, 8.0, 100), (400, 1.0, 256 << 20)):
        plan.learn(PartResult("", rows, size_bytes, seconds, None))
        sizes.append(plan._size.max_rows)
    assert sizes == [256, 1024, 512, 100]


def test_several_threads_prepare_parts_at_once(tmp_path, processing):
    """Those with another limit on pixels wait; afterwards the process is as before."""
    from vlm.data.process_settings import preparing

    before, seen = Image.MAX_IMAGE_PIXELS, []

    def work(limit):
        with preparing(limit):
            seen.extend((limit, Image.MAX_IMAGE_PIXELS) for _ in range(50))

    threads = [threading.Thread(target=work, args=(100 + number % 2,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 400
    assert all(limit == actual for limit, actual in seen)
    assert before == Image.MAX_IMAGE_PIXELS


def test_pixels_of_a_part_are_views(make_rows, write_parquet, tmp_path, processing):
    from vlm.data.part_files import read_part

    (tmp_path / "processor").mkdir()
    part = one_part(write_parquet(make_rows(10)), tmp_path / "exchange")
    with exchange.ExchangeOwner(str(tmp_path / "exchange"), tmp_path / "processor", tmp_path):
        result = prepare_part(part, lambda folder: processing)
    rows = list(read_part(tmp_path / "exchange" / result.file))
    assert [row.id for row in rows] == [f"row-{number}" for number in range(10)]
    assert not any(image.flags.owndata for row in rows for image in row.record.pixels)
    picture = Image.open(io.BytesIO(make_rows(1)[0]["image"])).convert("RGB")
    size = processing.target_size(picture.height, picture.width)
    np.testing.assert_array_equal(rows[0].record.pixels[0].reshape(*size, 3), processing.resize_image(picture, size))
