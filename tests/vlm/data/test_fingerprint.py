"""The digest changes with the content, only with it, and costs nothing while nothing changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import fsspec
import pytest

from vlm.config.data import SourceConfig
from vlm.data import stat_cache
from vlm.data.fingerprint import source_digest
from vlm.errors import DataError


def digest(path, **options):
    return source_digest(SourceConfig(path=str(path), **options))


def test_a_file_counts_by_name_and_content_not_by_place(tmp_path, write_jsonl):
    path = write_jsonl([{"text": "a"}], "one/rows.jsonl")
    first = digest(path)
    assert digest(write_jsonl([{"text": "a"}], "two/rows.jsonl")) == first
    assert digest(write_jsonl([{"text": "b"}], "two/rows.jsonl")) != first
    assert digest(write_jsonl([{"text": "a"}], "two/train.jsonl")) != first
    assert digest(path, split="test", max_rows=3) == first


def test_images_that_rows_name_count(tmp_path, make_png, write_jsonl):
    messages = [{"role": "user", "content": [{"type": "image", "image": "pics/b.JPG"}]}]
    path = write_jsonl([{"image": "pics/a.png", "text": "x"}, {"messages": messages, "text": "y"}])
    seen = [digest(path)]
    (tmp_path / "pics").mkdir()
    for name, seed in (("a.png", 1), ("a.png", 2), ("b.JPG", 3), ("unrelated.png", 4)):
        (tmp_path / "pics" / name).write_bytes(make_png(seed))
        seen.append(digest(path))
    # Appearing and changing counts; a file that no row names does not.
    assert len(set(seen[:4])) == 4
    assert seen[4] == seen[3]


def test_images_outside_the_folder_are_not_read(tmp_path, make_png, write_jsonl):
    path = write_jsonl([{"image": "../a.png", "text": "x"}], "set/rows.jsonl")
    before = digest(path)
    (tmp_path / "a.png").write_bytes(make_png())
    assert digest(path) == before


def test_a_folder_counts_with_everything_beneath(tmp_path, make_png, write_jsonl):
    write_jsonl([{"file_name": "a.png", "text": "x"}], "set/metadata.jsonl")
    (tmp_path / "set" / "a.png").write_bytes(make_png(1))
    first = digest(tmp_path / "set")
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    assert digest(tmp_path / "copy") == first
    (tmp_path / "set" / "a.png").write_bytes(make_png(2))
    second = digest(tmp_path / "set")
    (tmp_path / "set" / "b.png").write_bytes(make_png(2))
    assert len({first, second, digest(tmp_path / "set")}) == 3


def test_globs_archives_and_memory(tmp_path, write_jsonl, make_rows, write_parquet):
    write_parquet(make_rows(2), "a.parquet")
    first = digest(f"{tmp_path}/*.parquet")
    write_parquet(make_rows(3), "b.parquet")
    assert digest(f"{tmp_path}/*.parquet") != first
    write_jsonl([{"text": "a"}], "set/rows.jsonl")
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set")
    zipped = digest(tmp_path / "set.zip")
    assert digest(f"zip://::{tmp_path}/set.zip") == zipped
    (tmp_path / "set.zip").write_bytes((tmp_path / "set.zip").read_bytes() + b"\0")
    assert digest(tmp_path / "set.zip") != zipped
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/fingerprint/rows.jsonl", b'{"text": "a"}\n')
    remote = digest("memory://fingerprint/rows.jsonl")
    fs.pipe_file("/fingerprint/rows.jsonl", b'{"text": "b"}\n')
    assert digest("memory://fingerprint/rows.jsonl") != remote
    fs.rm("/fingerprint", recursive=True)


def test_nothing_is_read_twice(tmp_path, write_jsonl, make_png, monkeypatch):
    monkeypatch.setattr(stat_cache, "RECENT_SECONDS", 0.0)
    path = write_jsonl([{"image": "a.png", "text": "x"}])
    (tmp_path / "a.png").write_bytes(make_png())
    source, hashed = SourceConfig(path=str(path)), []
    first = source_digest(source, cache_dir=tmp_path / "cache", on_bytes=hashed.append)
    assert sum(hashed) == path.stat().st_size + (tmp_path / "a.png").stat().st_size
    assert source_digest(source, cache_dir=tmp_path / "cache", on_bytes=hashed.append) == first
    assert len(hashed) == 2
    (tmp_path / "a.png").write_bytes(make_png(5))
    assert source_digest(source, cache_dir=tmp_path / "cache", on_bytes=hashed.append) != first
    assert len(hashed) == 3


def test_a_file_that_was_just_written_is_hashed_again(tmp_path, write_jsonl):
    """Same size, same time stamp: only the content tells, so a young file's hash is not trusted."""
    path = write_jsonl([{"text": "a"}])
    stat = path.stat()
    first = source_digest(SourceConfig(path=str(path)), cache_dir=tmp_path / "cache")
    path.write_text('{"text": "b"}\n')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source_digest(SourceConfig(path=str(path)), cache_dir=tmp_path / "cache") != first


def test_a_damaged_cache_is_thrown_away(tmp_path, write_jsonl):
    path = write_jsonl([{"text": "a"}])
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "source_digests.sqlite").write_bytes(b"this is no database" * 100)
    assert source_digest(SourceConfig(path=str(path)), cache_dir=tmp_path / "cache") == digest(path)


def test_a_hub_dataset_counts_by_commit(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"

    class Info:
        sha = commit

    asked = []

    def dataset_info(self, name, revision=None, timeout=None):
        asked.append((name, revision))
        return Info

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    moving = digest("someone/receipts", format="hub", revision="main")
    assert digest("someone/receipts", format="hub", revision=commit) == moving
    assert asked == [("someone/receipts", "main")]

    def offline(self, name, revision=None, timeout=None):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(DataError, match="full commit"):
        digest("someone/receipts", format="hub")


def test_a_missing_source_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        digest(tmp_path / "nothing.parquet")
    with pytest.raises(DataError, match="container"):
        digest(f"zip://a.csv::{tmp_path}/nothing.zip")


def test_imports_are_light(write_jsonl):
    path = write_jsonl([{"text": "a"}])
    script = (
        "import sys\nfrom vlm.config.data import SourceConfig\nfrom vlm.data.fingerprint import source_digest\n"
        f"source_digest(SourceConfig())\nsource_digest(SourceConfig(path={str(path.parent)!r}))\n"
        "print([name for name in ('torch', 'pyarrow', 'datasets', 'PIL', 'numpy', 'transformers') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )
