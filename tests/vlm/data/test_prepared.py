"""The reader gives back what was prepared, in this process and in others."""

from __future__ import annotations

import multiprocessing
import pickle

import numpy as np
import pytest

from vlm.data import storage
from vlm.data.prepared import PreparedDataset
from vlm.errors import DataError


@pytest.fixture
def dataset(make_rows, write_parquet, prepare, monkeypatch):
    monkeypatch.setattr(storage, "BATCH_SIZE_BYTES", 15_000)
    monkeypatch.setattr(storage, "SHARD_SIZE_BYTES", 30_000)
    return prepare(write_parquet(make_rows(25))).split("train")


def first_pixel_sums(dataset):
    return [int(row.images[0].sum()) for row in dataset]


def test_columns_equal_the_rows(dataset):
    rows = list(dataset)
    assert len(rows) == len(dataset) == 25
    assert dataset.num_tokens.tolist() == [len(row.input_ids) for row in rows]
    assert dataset.num_visual_tokens.tolist() == [int((row.input_ids == 2).sum()) for row in rows]
    assert dataset.num_supervised_tokens.tolist() == [
        sum(end - start for start, end in row.assistant_spans) for row in rows
    ]
    assert dataset.num_pixels.tolist() == [row.images[0].shape[0] * row.images[0].shape[1] for row in rows]
    assert [dataset.image_sizes(index) for index in range(25)] == [
        [image.shape[:2] for image in row.images] for row in rows
    ]
    assert dataset.ids == [row.id for row in rows]


def test_spans_hold_the_answer(dataset):
    row = dataset[4]
    ((start, end),) = row.assistant_spans
    assert bytes(token - 10 for token in row.input_ids[start : end - 1].tolist()).decode() == row.target == "answer 4 é"


def test_colour_is_read_without_a_copy_and_grey_is_expanded(dataset):
    colour, grey = dataset[0].images[0], dataset[1].images[0]
    assert colour.base is not None
    assert not colour.flags.writeable
    assert grey.shape[2] == 3
    assert (grey[..., 0] == grey[..., 2]).all()
    assert grey.dtype == colour.dtype == np.uint8


def test_it_can_be_pickled_after_reading_and_read_in_other_processes(dataset):
    sums = first_pixel_sums(dataset)
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own object, as a data loader's workers get it
    assert first_pixel_sums(copy) == sums
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(sum, (copy.num_tokens.tolist(),)) == dataset.num_tokens.sum()


def test_columns_are_copies(dataset):
    dataset.num_tokens[:] = 0
    assert dataset.num_tokens.min() > 0


def test_indices(dataset):
    assert dataset[-1].id == dataset[24].id == "row-24"
    with pytest.raises(IndexError):
        dataset[25]


def test_an_empty_split_has_no_rows(dataset):
    empty = PreparedDataset(dataset.dataset_dir, "test")
    assert len(empty) == 0
    assert list(empty) == []
    assert empty.num_tokens.shape == (0,)
    assert empty.ids == []


def test_errors(dataset, tmp_path):
    with pytest.raises(DataError, match="split 'dev' is unknown"):
        PreparedDataset(dataset.dataset_dir, "dev")
    with pytest.raises(DataError, match="not a prepared dataset"):
        PreparedDataset(tmp_path / "nothing", "train")


@pytest.mark.parametrize("dtype", [None, np.int32, np.int64, np.uint16])
def test_tokens_are_kept_whatever_type_they_come_in(dtype: type | None) -> None:
    tokens = [1, 70_000 if dtype is not np.uint16 else 7, 3]
    ids = tokens if dtype is None else np.array(tokens, dtype)
    batch = storage.Batch()
    for _ in range(2):
        batch.add("a", storage.Record(None, "[]", "", "{}", ids, [0, 2], [], [], [], [], 0, 1))
    columns = dict(zip((field.name for field in storage.DATA_SCHEMA), batch.data_columns(), strict=True))
    assert columns["input_ids"].to_pylist() == [tokens, tokens]
