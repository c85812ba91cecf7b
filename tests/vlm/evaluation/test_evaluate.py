import json
from pathlib import Path

import numpy as np
import pytest

from vlm.config import EvaluationConfig
from vlm.errors import DataError
from vlm.evaluation.evaluate import evaluate_predictions
from vlm.evaluation.failures import failure_kinds
from vlm.evaluation.intervals import clusters, interval, paired_p_value, resampled_values
from vlm.evaluation.metrics import cleaner
from vlm.evaluation.predictions import Prediction, PredictionsSummary, read_predictions, write_predictions
from vlm.evaluation.slices import slice_values


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


def test_two_models_are_told_apart_by_a_paired_test(tmp_path: Path) -> None:
    # The tuned model is right on four rows where the base is wrong; swapping answers gives all 16 patterns of signs, of
    # which two (all kept, all swapped) differ by as much: p = 1/8.
    tuned = write(tmp_path / "tuned", [("a", "a")] * 4)
    base = write(tmp_path / "base", [("a", "b")] * 4)
    evaluate_predictions(tuned, base, EvaluationConfig(metrics=("exact_match",)), tmp_path)
    difference = json.loads((tmp_path / "metrics.json").read_text())["metrics"]["exact_match"]["difference"]
    assert difference["value"] == 1
    # Of 9,999 random swaps; the standard error is 0.0033.
    assert difference["p_value"] == pytest.approx(1 / 8, abs=0.015)


def test_the_paired_test_finds_what_is_there_and_nothing_else() -> None:
    generator = np.random.default_rng(1)
    rows, lengths = np.arange(200), generator.integers(1, 20, 200).astype(float)
    first, second = (np.stack([generator.binomial(lengths.astype(int), 0.3), lengths], 1) for _ in range(2))
    better = np.stack([np.maximum(first[:, 0] - 1, 0), lengths], 1)
    assert paired_p_value(first, first, rows) == 1
    assert paired_p_value(first, second, rows) > 0.05
    assert paired_p_value(better, first, rows) == 1 / 10_000
    # The same difference between two groups only is no evidence: half of all swaps do as much.
    assert paired_p_value(better, first, rows // 100) > 0.2
    # Lengths may differ between the models, as those of an alignment do. All four ways of swapping, by hand: 1/6, 3/6,
    # 3/6 and 1/6 apart, so all are at least as far apart as they are.
    left, right = np.array([[0.0, 4.0], [2.0, 2.0]]), np.array([[1.0, 2.0], [0.0, 4.0]])
    assert paired_p_value(left, right, np.arange(2)) == 1


def test_slices_failures_references_and_worst_rows(tmp_path: Path) -> None:
    for name, answers in (("tuned", ["cat", "DOG", "Maus", ""]), ("base", ["кот", "dog", "Maus", "Bird"])):
        (tmp_path / name).mkdir()
        rows = [
            Prediction("1", None, "p", "cat", answers[0], 1, "stop", {"language": "en", "page": 1, "answers": ["cat"]}),
            Prediction("2", None, "p", "dog", answers[1], 1, "stop", {"language": "en", "page": 2}),
            Prediction(
                "3", None, "p", "Ratte", answers[2], 1, "length", {"language": "de", "answers": ["Ratte", "Maus"]}
            ),
            Prediction("4", None, "p", "Bird", answers[3], 1, "stop", {"page": 2}),
        ]
        write_predictions(rows, PredictionsSummary("test", 4, name == "tuned", 4, 3), tmp_path / name)
    settings = EvaluationConfig(metrics=("exact_match", "cer"), slice_by=("language", "page"))
    evaluate_predictions(tmp_path / "tuned", tmp_path / "base", settings, tmp_path)
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert document["metrics"]["exact_match"]["tuned"]["value"] == 0.5
    assert {name: entry["num_rows"] for name, entry in document["slices"]["language"].items()} == {
        "en": 2,
        "de": 1,
        "(none)": 1,
    }
    english = document["slices"]["language"]["en"]
    assert english["exact_match"]["tuned"]["value"] == english["exact_match"]["base"]["value"] == 0.5
    assert english["cer"]["difference"]["value"] == pytest.approx((3 - 3) / 6)
    assert set(document["slices"]["page"]) == {"1", "2", "(none)"}
    assert document["failures"] == {
        "empty": {"tuned": 1, "base": 0},
        "truncated": {"tuned": 1, "base": 1},
        "repetition": {"tuned": 0, "base": 0},
        "wrong_case": {"tuned": 1, "base": 0},
        "wrong_script": {"tuned": 0, "base": 1},
        "wrong_language": {"tuned": 0, "base": 0},
        "not_json": {"tuned": 0, "base": 0},
    }
    assert document["worst_rows"] == ["2", "4", "1", "3"]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[2]["references"] == ["Ratte", "Maus"]
    assert "references" not in rows[0]
    assert rows[3]["slices"] == {"language": "(none)", "page": "2"}
    assert [row["tuned"]["failures"] for row in rows] == [[], ["wrong_case"], ["truncated"], ["empty"]]


def test_a_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    tuned = write(tmp_path / "tuned", [("a", "a")])
    with pytest.raises(DataError, match=r"slice_by names 'langauge'.*There are none"):
        evaluate_predictions(tuned, None, EvaluationConfig(slice_by=("langauge",)), tmp_path)


def test_rare_values_share_a_slice() -> None:
    rows = [Prediction(str(i), None, "", "a", "a", 1, "stop", {"page": i // 2 if i < 10 else i}) for i in range(60)]
    values = slice_values(rows, "page")
    assert len(set(values)) == 30
    assert values[:4] == ["0", "0", "1", "1"]
    assert values[-1] == "(others)"
    grouped = [Prediction(str(i), f"document-{i // 2}", "", "a", "a", 1, "stop") for i in range(4)]
    assert slice_values(grouped, "group") == ["document-0", "document-0", "document-1", "document-1"]


def test_a_target_that_a_metric_cannot_read_is_named(tmp_path: Path) -> None:
    tuned = write(tmp_path / "tuned", [('{"a": 1}', "{}"), ("a", "a")])
    with pytest.raises(DataError, match=r"row 'row-1' cannot be scored with field_f1: the target 'a' is no JSON"):
        evaluate_predictions(tuned, None, EvaluationConfig(task="extraction"), tmp_path)


@pytest.mark.parametrize(
    ("target", "prediction", "finish_reason", "kinds"),
    [
        ("cat", "dog", "stop", []),
        ("cat", " ", "stop", ["empty"]),
        ("cat", "the cat the cat the cat the cat", "stop", ["repetition"]),
        ("=" * 20, "=" * 40, "stop", []),  # no more than twice what was expected
        ("=" * 20, "=" * 41, "length", ["truncated", "repetition"]),
        ("cat", "ha ha ha ha", "stop", []),  # too short to tell
        ("Straße", "STRASSE", "stop", ["wrong_case"]),
        ("cat", "猫が好き", "stop", ["wrong_script"]),
        ("猫が好き", "好き", "stop", []),
        ("12", "zwölf", "stop", []),  # no letters to compare with
        (
            "Two children are playing with a ball on the beach.",
            "Zwei Kinder spielen am Strand mit einem Ball.",
            "stop",
            ["wrong_language"],
        ),
        ('{"a": 1}', "a: 1", "stop", ["not_json"]),
        ('{"a": 1}', '{"a": 2}', "stop", []),
    ],
)
def test_failure_kinds(target: str, prediction: str, finish_reason: str, kinds: list[str]) -> None:
    row = Prediction("1", None, "p", target, prediction, 1, finish_reason)
    assert failure_kinds(row, cleaner(EvaluationConfig())) == kinds


def test_what_the_normalisation_takes_away_is_no_failure() -> None:
    row = Prediction("1", None, "p", "cat", "CAT", 1, "stop")
    assert failure_kinds(row, cleaner(EvaluationConfig(ignore_case=True))) == []
