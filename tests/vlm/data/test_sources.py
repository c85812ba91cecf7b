"""Every format gives the same rows, on disk, in memory and in S3."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm.config.data import SourceConfig
from vlm.data import hub
from vlm.data.locations import resolve, split_from_name
from vlm.data.sources import open_streams
from vlm.errors import DataError

FORMATS = [
    "parquet",
    "arrow_file",
    "arrow_stream",
    "jsonl",
    "jsonl_gz",
    "csv",
    "imagefolder_csv",
    "imagefolder_jsonl",
    "imagefolder_parquet",
]


def put(address: str, data: bytes) -> None:
    fs, path = fsspec.core.url_to_fs(address)
    fs.makedirs(fs._parent(path), exist_ok=True)
    fs.pipe_file(path, data)


def write_source(address: str, kind: str, rows: list[dict[str, Any]]) -> str:
    """Writes rows in a format; images go beside it where the format holds paths. Returns the source's path."""
    table = pa.Table.from_pylist([{**row, "image": {"bytes": row["image"], "path": "x.png"}} for row in rows])
    sink = io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink, row_group_size=3)
        name = "rows.parquet"
    elif kind.startswith("arrow"):
        new = pa.ipc.new_file if kind == "arrow_file" else pa.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
        name = "rows.arrow"
    else:
        column = "file_name" if kind.startswith("imagefolder") else "image"
        plain = [{**{k: v for k, v in row.items() if k != "image"}, column: f"images/{row['id']}.png"} for row in rows]
        for row, written in zip(rows, plain, strict=True):
            put(f"{address}/{written[column]}", row["image"])
        stem = "metadata" if kind.startswith("imagefolder") else "rows"
        if kind.endswith("csv"):
            text = io.StringIO()
            writer = csv.DictWriter(text, list(plain[0]))
            writer.writeheader()
            writer.writerows(plain)
            sink.write(text.getvalue().encode("utf-8-sig"))
            name = f"{stem}.csv"
        elif kind.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist(plain), sink)
            name = f"{stem}.parquet"
        else:
            sink.write("".join(json.dumps(row) + "\n" for row in plain).encode())
            name = f"{stem}.jsonl"
    data = sink.getvalue()
    if kind == "jsonl_gz":
        import gzip

        data, name = gzip.compress(data), name + ".gz"
    put(f"{address}/{name}", data)
    return address if kind.startswith("imagefolder") else f"{address}/{name}"


def check_rows(rows: list[dict[str, Any]], prepared: Any, processing: Any) -> None:
    """What was prepared equals what plain Pillow makes of the rows."""
    found = prepared.all_rows()
    assert list(found) == [row["id"] for row in rows]
    for row in rows:
        got = found[row["id"]]
        image = Image.open(io.BytesIO(row["image"])).convert("RGB")
        height, width = processing.target_size(image.height, image.width)
        np.testing.assert_array_equal(
            got.images[0], np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        )
        assert (got.target, got.group) == (row["text"], row["group"])
        assert got.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": row["question"]}]
        assert str(got.metadata["page"]) == str(row["page"])


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_rows(kind, folder_address, make_rows, prepare, processing):
    rows = make_rows(11)
    check_rows(rows, prepare(write_source(folder_address, kind, rows)), processing)


@pytest.mark.parametrize("form", ["dataset", "dataset_dict"])
def test_folders_saved_by_datasets(form, folder_address, tmp_path, make_rows, prepare, processing):
    datasets = pytest.importorskip("datasets")
    rows = make_rows(6)
    features = datasets.Features(
        {
            **{name: datasets.Value("string") for name in ("id", "group", "question", "text")},
            "page": datasets.Value("int32"),
            "image": datasets.Image(),
        }
    )
    dataset = datasets.Dataset.from_list(
        [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows], features=features
    )
    local = tmp_path / "saved"
    if form == "dataset":
        dataset.save_to_disk(str(local), num_shards=2)
    else:
        datasets.DatasetDict({"train": dataset.select(range(4)), "test": dataset.select(range(4, 6))}).save_to_disk(
            str(local)
        )
    for path in local.rglob("*"):
        if path.is_file():
            put(f"{folder_address}/{path.relative_to(local).as_posix()}", path.read_bytes())
    prepared = prepare(sources=[{"path": folder_address, "split": "train" if form == "dataset" else None}])
    check_rows(rows, prepared, processing)
    assert prepared.summary.num_rows == (
        {"train": 6, "validation": 0, "test": 0} if form == "dataset" else {"train": 4, "validation": 0, "test": 2}
    )


def test_class_labels_become_their_names(tmp_path, make_rows, prepare):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"id": row["id"], "image": {"bytes": row["image"], "path": None}, "label": index % 2}
        for index, row in enumerate(make_rows(2))
    ]
    features = datasets.Features(
        {"id": datasets.Value("string"), "image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(str(tmp_path / "saved"))
    dataset.to_parquet(str(tmp_path / "rows.parquet"))
    for path in ("saved", "rows.parquet"):
        assert [row.target for row in prepare(tmp_path / path).split("train")] == ["cat", "dog"]


def test_hub_datasets_stream(tmp_path, make_rows, prepare, processing, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = make_rows(6)
    features = datasets.Features(
        {
            **{name: datasets.Value("string") for name in ("id", "group", "question", "text")},
            "page": datasets.Value("int32"),
            "image": datasets.Image(),
        }
    )
    table = datasets.Dataset.from_list(
        [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows], features=features
    )
    table.select(range(4)).to_parquet(str(tmp_path / "a.parquet"))
    table.select(range(4, 6)).to_parquet(str(tmp_path / "b.parquet"))
    files = {"train": str(tmp_path / "a.parquet"), "validation": str(tmp_path / "b.parquet")}
    load, asked = datasets.load_dataset_builder, []

    def from_hub(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return load("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", from_hub)
    with pytest.raises(DataError, match=r"'someone/receipts' names the file '.*[ab].parquet', which is not on the Hub"):
        prepare(sources=[{"path": "someone/receipts"}])
    asked.clear()
    checked = []
    monkeypatch.setattr(hub, "check_files", lambda name, files: checked.append((name, len(files))))
    prepared = prepare(sources=[{"path": "someone/receipts", "subset": "en", "revision": "main"}])
    check_rows(rows, prepared, processing)
    assert prepared.summary.num_rows == {"train": 4, "validation": 2, "test": 0}
    assert asked == [("someone/receipts", {"name": "en", "revision": "main"})]
    assert checked == [("someone/receipts", 2)]


@pytest.mark.parametrize(
    ("file", "refused"),
    [
        ("hf://datasets/a/b@0/data.parquet", False),
        ("zip://rows.csv::hf://datasets/a/b@0/x.zip", False),
        ("/etc/passwd", True),
        ("file:///etc/passwd", True),
        ("http://169.254.169.254/latest", True),
        ("zip://rows.csv::/home/me/x.zip", True),
        ("hf://datasets/a/b@0/x::/etc/passwd", True),
    ],
)
def test_files_of_a_hub_dataset_are_on_the_hub(file, refused):
    if refused:
        with pytest.raises(DataError, match="which is not on the Hub"):
            hub.check_files("a/b", {"train": [file]})
    else:
        hub.check_files("a/b", {"train": [file]})
        hub.check_files("a/b", None)


def test_a_hub_dataset_that_cannot_be_reached_is_a_data_error(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    with pytest.raises(DataError, match=r"'someone/receipts'.*no network.*HF_TOKEN"):
        open_streams((SourceConfig(path="someone/receipts", format="hub"),))


def test_s3(make_rows, prepare, processing, monkeypatch):
    pytest.importorskip("s3fs")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    try:
        fsspec.filesystem("s3").mkdir("bucket")
        rows = make_rows(5)
        for kind in ("parquet", "imagefolder_jsonl"):
            check_rows(rows, prepare(write_source(f"s3://bucket/{kind}", kind, rows), num_workers=2), processing)
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
        server.stop()


def test_zip_archives_are_read_in_place(tmp_path, make_rows, prepare, processing):
    import shutil

    rows = make_rows(4)
    write_source(str(tmp_path / "folder"), "imagefolder_csv", rows)
    shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "folder")
    check_rows(rows, prepare(tmp_path / "images.zip", num_workers=2), processing)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.parquet", "train"),
        ("data/val-00000-of-00002.parquet", "validation"),
        ("dev.jsonl", "validation"),
        ("test/part-0.csv", "test"),
        ("train/latest.csv", "train"),
        ("train_test.csv", None),
        ("contest.csv", None),
    ],
)
def test_names_give_splits(name, split):
    assert split_from_name(name) == split


def test_several_files_by_glob_and_folder(tmp_path, make_rows, prepare):
    rows = make_rows(9)
    for name, part in (("train-0", rows[:3]), ("train-1", rows[3:6]), ("validation", rows[6:8]), ("test", rows[8:])):
        write_source(str(tmp_path / name), "parquet", part)
        (tmp_path / name / "rows.parquet").rename(tmp_path / f"{name}.parquet")
        (tmp_path / name).rmdir()
    for path in (tmp_path, f"{tmp_path}/*.parquet"):
        prepared = prepare(sources=[{"path": str(path)}])
        assert prepared.summary.num_rows == {"train": 6, "validation": 2, "test": 1}
        assert [row.id for row in prepared.split("test")] == ["row-8"]
    limited = prepare(sources=[{"path": str(tmp_path), "max_rows": 4}])
    assert limited.summary.num_rows == {"train": 4, "validation": 2, "test": 1}


def test_a_single_named_split_says_nothing(tmp_path, make_rows, prepare):
    write_source(str(tmp_path / "x"), "parquet", make_rows(60))
    (tmp_path / "x" / "rows.parquet").rename(tmp_path / "train.parquet")
    counts = prepare(sources=[{"path": str(tmp_path / "train.parquet")}], split={"test_fraction": 0.4}).summary.num_rows
    assert counts["train"] > 0
    assert counts["test"] > 0


def source_error(path: Any, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_streams((SourceConfig(path=str(path), **settings),))
    return str(caught.value)


def test_errors_of_sources_say_what_to_do(tmp_path, make_png, write_jsonl):
    write_jsonl([{"text": "a"}], "receipts.jsonl")
    assert "Did you mean 'receipts.jsonl'?" in source_error(tmp_path / "reciepts.jsonl")
    assert "matches no file" in source_error(tmp_path / "*.parquet")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(make_png())
    assert "Add metadata.csv" in source_error(tmp_path / "pictures")
    write_jsonl([{"name": "a.png", "text": "x"}], "named/metadata.jsonl")
    assert "'file_name'" in source_error(tmp_path / "named")
    (tmp_path / "notes.txt").write_text("x")
    assert "ending of 'notes.txt'" in source_error(tmp_path / "notes.txt")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.csv").write_text("text\nx\n")
    (tmp_path / "mixed" / "b.jsonl").write_text("{}\n")
    assert "several formats (csv, jsonl)" in source_error(tmp_path / "mixed")
    (tmp_path / "empty.csv").write_text("")
    assert "has no columns" in source_error(tmp_path / "empty.csv")
    (tmp_path / "array.json").write_text('[{"text": "a"}]')
    assert "jq -c '.[]'" in source_error(tmp_path / "array.json")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    assert "cannot be read as parquet" in source_error(tmp_path / "cut.parquet")
    assert "not written by save_to_disk" in source_error(tmp_path / "mixed", format="saved")
    assert "nosuchprotocol" in source_error("nosuchprotocol://a/b.csv")


def test_unparsable_rows_are_in_the_ledger(tmp_path, prepare):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n[1]\n\n{"text": "b"}\n')
    prepared = prepare(tmp_path / "rows.jsonl")
    assert prepared.reasons == [("dropped", "bad_json")] * 2
    assert prepared.summary.num_rows["train"] == 2
    (tmp_path / "rows.csv").write_text('text,id\na,1\n"b,2\n3"\nc,3\n')
    prepared = prepare(tmp_path / "rows.csv")
    assert [(entry["row"], entry["reason"]) for entry in prepared.ledger] == [(1, "bad_csv")]
    assert [row.target for row in prepared.split("train")] == ["a", "c"]


def test_text_that_is_not_utf8_is_a_data_error(tmp_path, prepare):
    (tmp_path / "rows.csv").write_bytes("text\ncafé\n".encode("latin-1"))
    with pytest.raises(DataError, match="Save it as UTF-8"):
        prepare(tmp_path / "rows.csv")


def test_hidden_files_are_no_data(tmp_path, write_jsonl):
    write_jsonl([{"text": "a"}], "set/rows.jsonl")
    write_jsonl([{"text": "a"}], "set/.cache/other.csv")
    assert [file.name for file in resolve(SourceConfig(path=str(tmp_path / "set"))).files] == ["rows.jsonl"]
