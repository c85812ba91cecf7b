from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from vlm.config import SubjectConfig
from vlm.errors import DataError
from vlm.evaluation.outside_predictions import import_predictions
from vlm.evaluation.predictions import read_predictions
from vlm.evaluation.subject import find_subject, import_adapter, subject_digest


def subject_of(path: Path | str, rows: list[dict[str, Any]] | None = None, **more: Any) -> Any:
    if rows is not None:
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return find_subject(SubjectConfig(path=str(path), **more))


def test_kinds_are_told_from_the_files(tmp_path: Path) -> None:
    for name, files in {
        "adapter": ["adapter_model.safetensors", "adapter_config.json", "README.md"],
        "model": ["config.json", "model-00001-of-00002.safetensors"],
        "predictions": ["predictions.jsonl", "predictions.json"],
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
        assert subject_of(tmp_path / name).kind == name
    assert subject_of("org/name").kind == "model"
    assert [name for name, _ in subject_of(tmp_path / "adapter").files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_whole_parts_trained_without_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "targets.json").write_text('{"full_finetuning": ["language"]}')
    assert subject_of(tmp_path).full_finetuning == ("language",)


def test_an_adapter_from_any_address(tmp_path: Path) -> None:
    with fsspec.open("memory://somewhere/run/adapter_model.safetensors", "wb") as file:
        file.write(b"weights")
    with fsspec.open("memory://somewhere/run/adapter_config.json", "wb") as file:
        file.write(b"{}")
    subject = subject_of("memory://somewhere/run")
    assert subject.kind == "adapter"
    assert import_adapter(subject, tmp_path) == 9
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"weights"
    local = subject_of(tmp_path)
    # The same content has the same digest, wherever it lies.
    assert subject_digest(subject, cache_dir=None) == subject_digest(local, cache_dir=None)


def test_answers_with_their_own_targets(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "prediction": "a", "target": "b", "group": 3, "metadata": {"shop": "x"}},
        {"id": "8", "prediction": "", "target": "c", "finish_reason": "length"},
    ]
    subject = subject_of(tmp_path / "a.jsonl", rows)
    out = tmp_path / "out"
    out.mkdir()
    import_predictions(subject, out, dataset_dir=None, split="test", max_rows=None)
    summary, (first, second) = read_predictions(out)
    assert (summary.num_rows, summary.num_finished) == (2, 1)
    assert (first.id, first.group, first.target, first.metadata) == ("7", "3", "b", {"shop": "x"})
    assert (second.prediction, second.finish_reason) == ("", "length")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no predictions"),
        ([{"id": "1", "prediction": "a"}], "has None as its target"),
        ([{"id": "1", "prediction": "a", "target": "b"}] * 2, "on lines 1 and 2"),
        ([{"id": "1", "prediction": "a", "target": "b", "finish_reason": "eos"}], "finish_reason 'eos'"),
    ],
)
def test_unusable_answers_are_named(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    subject = subject_of(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=message):
        import_predictions(subject, tmp_path, dataset_dir=None, split="test", max_rows=None)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tiny_models import make_tiny_checkpoint
    from tests.support.tiny_runs import mixed_rows, write_dataset
    from vlm.processing import Processing

    folder = tmp_path_factory.mktemp("dataset")
    processing = Processing.from_dir(make_tiny_checkpoint("qwen2_vl", folder / "model"))
    return write_dataset(folder / "dataset", processing, {"test": mixed_rows(3)})


def test_answers_are_joined_by_id_in_the_order_of_the_dataset(dataset: Path, tmp_path: Path) -> None:
    from vlm.data.prepared import PreparedDataset

    rows = [{"id": f"test-{number}", "prediction": f"answer {number}"} for number in (2, 0, 1)]
    subject = subject_of(tmp_path / "a.jsonl", rows)
    import_predictions(subject, tmp_path, dataset_dir=dataset, split="test", max_rows=2)
    _, done = read_predictions(tmp_path)
    assert [row.prediction for row in done] == ["answer 0", "answer 1"]
    assert [row.target for row in done] == [row.target for row in PreparedDataset(dataset, "test")][:2]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["test-0", "test-1"], "no prediction for 1 of 3 rows of the test split, first 'test-2'"),
        (["test-0", "test-1", "test-2", "tset-3"], r"line 4 has id 'tset-3', which the test split does not have"),
    ],
)
def test_answers_to_other_rows_are_refused(ids: list[str], message: str, dataset: Path, tmp_path: Path) -> None:
    subject = subject_of(tmp_path / "a.jsonl", [{"id": row_id, "prediction": "x"} for row_id in ids])
    with pytest.raises(DataError, match=message):
        import_predictions(subject, tmp_path, dataset_dir=dataset, split="test", max_rows=None)


def test_the_longest_answer_of_a_dataset_without_training_rows(dataset: Path) -> None:
    from vlm.data.prepared import PreparedDataset
    from vlm.generate import longest_answer

    assert longest_answer(dataset) >= 1.5 * PreparedDataset(dataset, "test").num_supervised_tokens.max()
