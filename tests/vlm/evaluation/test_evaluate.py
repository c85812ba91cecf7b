import json
from pathlib import Path

import numpy as np
import pytest

from vlm.config import EvaluationConfig
from vlm.errors import DataError
from vlm.evaluation.evaluate import evaluate_predictions
from vlm.evaluation.intervals import clusters, interval, resampled_values
from vlm.evaluation.predictions import Prediction, PredictionsSummary, read_predictions, write_predictions


def write(folder: Path, pairs: list[tuple[str, str]], *, use_adapter: bool = True, groups: list | None = None) -> Path:
    folder.mkdir()
    rows = [
        Prediction(f"row-{i}", groups[i] if groups else None, "Read.", target, prediction, 3, "stop")
        for i, (target, prediction) in enumerate(pairs)
    ]
    write_predictions(rows, PredictionsSummary("test", len(rows), use_adapter, 3 * len(rows), len(rows)), folder)
    return folder


def test_corpus_values_are_sums_over_sums(tmp_path: Path) -> None:
    # Edits 0 of 4 and 2 of 2 characters: corpus 2/6, not the mean (0 + 1) / 2. Words: 0 of 1, 1 of 1.
    tuned = write(tmp_path / "tuned", [("abcd", "abcd"), ("ab", "xy")])
    # Edits 4 of 4 and 0 of 2.
    base = write(tmp_path / "base", [("abcd", ""), ("ab", "ab")], use_adapter=False)
    out = tmp_path / "out"
    out.mkdir()
    summary = evaluate_predictions(tuned, base, EvaluationConfig(), out)
    assert summary.tuned == {"cer": pytest.approx(2 / 6), "wer": 0.5, "exact_match": 0.5}
    assert summary.base == {"cer": pytest.approx(4 / 6), "wer": 0.5, "exact_match": 0.5}
    document = json.loads((out / "metrics.json").read_text())
    assert document["metrics"]["cer"]["better"] == "lower"
    assert document["metrics"]["exact_match"]["better"] == "higher"
    assert document["metrics"]["cer"]["difference"]["value"] == pytest.approx(-2 / 6)
    assert document["normalization"]["collapse_whitespace"] is True
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["tuned"]["cer"] for row in rows] == [0, 1]
    assert [row["base"]["cer"] for row in rows] == [1, 0]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    tuned = write(tmp_path / "tuned", [("abcd", "abce"), ("ab", "xy"), ("hello", "hallo")])
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        evaluate_predictions(tuned, None, EvaluationConfig(), tmp_path / name)
        contents.append([(tmp_path / name / file).read_bytes() for file in ("metrics.json", "rows.jsonl")])
    assert contents[0] == contents[1]


def test_other_rows_in_the_base_predictions_are_refused(tmp_path: Path) -> None:
    tuned = write(tmp_path / "tuned", [("a", "a")])
    base = write(tmp_path / "base", [("b", "a")])
    with pytest.raises(DataError, match="not the same rows"):
        evaluate_predictions(tuned, base, EvaluationConfig(), tmp_path)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="test_fraction"):
        evaluate_predictions(write(tmp_path / "tuned", []), None, EvaluationConfig(), tmp_path)


def test_a_cut_predictions_file_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "tuned", [("a", "a"), ("b", "b")])
    lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_text(lines[0])
    with pytest.raises(DataError, match="has 1 rows but its summary says 2"):
        read_predictions(folder)


def test_groups_are_one_cluster_and_rows_without_a_group_their_own() -> None:
    assert clusters(["g", None, "g", None]).tolist() == [0, 1, 0, 2]


def test_one_cluster_has_no_spread_and_many_have() -> None:
    scores = np.array([[0.0, 1.0], [1.0, 1.0]] * 50)
    together = resampled_values(scores, np.zeros(100, dtype=np.int64))
    assert np.ptp(together) == 0
    apart = interval(0.5, resampled_values(scores, np.arange(100)))
    # A share of one half among 100 rows has standard error 0.05, so the interval is about 0.5 ± 0.098.
    assert apart.low == pytest.approx(0.402, abs=0.02)
    assert apart.high == pytest.approx(0.598, abs=0.02)


def test_the_difference_is_paired(tmp_path: Path) -> None:
    # The base is one character worse on every row of the same length: the difference is the same on every draw,
    # although both values vary.
    texts = ["a" * 10] * 30
    tuned = write(tmp_path / "tuned", [(text, "b" * (i % 5) + text[i % 5 :]) for i, text in enumerate(texts)])
    base = write(tmp_path / "base", [(text, "b" * (i % 5 + 1) + text[i % 5 + 1 :]) for i, text in enumerate(texts)])
    evaluate_predictions(tuned, base, EvaluationConfig(metrics=("cer",)), tmp_path)
    entry = json.loads((tmp_path / "metrics.json").read_text())["metrics"]["cer"]
    assert entry["difference"]["low"] == pytest.approx(-0.1)
    assert entry["difference"]["high"] == pytest.approx(-0.1)
    assert entry["tuned"]["high"] - entry["tuned"]["low"] > 0.05


def test_a_single_group_is_resampled_by_rows(tmp_path: Path) -> None:
    pairs = [("abcd", "abcd"), ("abcd", "xyzw")] * 5
    evaluate_predictions(write(tmp_path / "tuned", pairs, groups=["g"] * 10), None, EvaluationConfig(), tmp_path)
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert document["interval"]["method"] == "percentile bootstrap over rows"
    assert document["metrics"]["cer"]["tuned"]["low"] < 0.5 < document["metrics"]["cer"]["tuned"]["high"]
