"""Processes give the same rows as threads, and what goes wrong in them is told."""

from __future__ import annotations

import os
import signal

import pytest

from tests.support.tiny_models import make_tiny_checkpoint
from vlm.config.data import DataConfig
from vlm.data import prepare as prepare_module
from vlm.data import workers as module
from vlm.data.prepare import prepare_dataset
from vlm.data.prepared import PreparedDataset
from vlm.data.sample import SampleMaker
from vlm.data.workers import Workers
from vlm.errors import ResourceError


@pytest.fixture(scope="module")
def real_processing(tmp_path_factory):
    from vlm.processing import Processing

    return Processing.from_dir(make_tiny_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def data(make_rows, tmp_path_factory):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = make_rows(40)
    rows[5]["image"] = b"broken"
    rows[6]["text"] = ""
    path = tmp_path_factory.mktemp("source") / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return DataConfig.model_validate({"sources": [{"path": str(path), "split": "train"}], "max_dropped_fraction": 1})


def chunks_of(data):
    streams = prepare_module.open_streams(data.sources)
    return list(prepare_module._chunks(prepare_module._jobs(streams, data)))


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(module, "START_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(module, "BUSY_SHARE", 1000.0)


@pytest.fixture(scope="module")
def started(data, real_processing):
    """Two processes for the whole module: each imports the tokenizer, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "START_AFTER_SECONDS", 0.0)
        patch.setattr(module, "BUSY_SHARE", 1000.0)
        workers = Workers(SampleMaker(data, real_processing), 2, may_start=True)
        workers.start_if_worthwhile()
    workers._starter.join()
    yield workers
    workers.close()


def test_processes_give_the_same_outcomes(started, data, real_processing):
    chunks = chunks_of(data)
    outcomes = [outcome for chunk in chunks for outcome in started(chunk)]
    assert started.num_rows_in_processes == len(outcomes) == 40
    maker = SampleMaker(data, real_processing)
    for outcome, job in zip(outcomes, (job for chunk in chunks for job in chunk), strict=True):
        expected = maker(job)
        if expected.sample is None:
            assert (outcome.error.reason, outcome.error.message) == (expected.error.reason, expected.error.message)
            assert outcome.error.details == expected.error.details
        else:
            assert outcome.sample.input_ids == expected.sample.input_ids
            assert (outcome.sample.images[0] == expected.sample.images[0]).all()
    assert [outcome.error is None for outcome in outcomes].count(False) == 2


def test_a_bug_in_a_process_comes_back_with_its_traceback(started):
    with pytest.raises(RuntimeError, match="in __call__"):
        started([None])


def test_a_process_that_dies_is_told_with_its_rows(started, data):
    # The last test with these processes.
    for process in started._processes:
        os.kill(process._popen.pid, signal.SIGKILL)
    with pytest.raises(ResourceError, match=r"exit code -9.*rows 0 to 15.*num_workers"):
        started(chunks_of(data)[0])


@pytest.mark.usefixtures("at_once")
def test_what_cannot_travel_stays_in_threads(data, real_processing):
    maker = SampleMaker(data, real_processing)
    maker.not_picklable = lambda: None
    for workers in (Workers(maker, 2, may_start=True), Workers(SampleMaker(data, real_processing), 2, may_start=False)):
        workers.start_if_worthwhile()
        assert workers._starter is None
        assert len(workers(chunks_of(data)[0])) == 16


def test_busy_threads_are_left_alone(monkeypatch, data, real_processing):
    monkeypatch.setattr(module, "START_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(module, "BUSY_SHARE", 0.0)
    workers = Workers(SampleMaker(data, real_processing), 2, may_start=True)
    workers.start_if_worthwhile()
    assert workers._starter is None


@pytest.mark.usefixtures("at_once")
def test_a_dataset_prepared_with_processes_has_the_same_bytes(data, real_processing, tmp_path):
    folders = [tmp_path / "threads", tmp_path / "processes"]
    for folder, num_workers in zip(folders, (0, 2), strict=True):
        folder.mkdir()
        prepare_dataset(data, real_processing, folder, num_workers=num_workers)
    files = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} for folder in folders]
    assert files[0] == files[1]


def test_lengths_are_those_of_the_real_processor(data, real_processing, tmp_path):
    prepare_dataset(data, real_processing, tmp_path, num_workers=2)
    for row in PreparedDataset(tmp_path, "train"):
        height, width = row.images[0].shape[:2]
        assert real_processing.target_size(height, width) == (height, width)
        num_visual = int((row.input_ids == real_processing.image_token_id).sum())
        assert num_visual == real_processing.num_image_tokens(height, width)
        ((start, end),) = row.assistant_spans
        assert real_processing.decode(row.input_ids[start:end].tolist()) == row.target
