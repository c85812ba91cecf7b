"""Comparison of results on a store of the test's own, with hand-made answers and records."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from artifacts.keys import step_key
from artifacts.refs import ArtifactRef
from artifacts.store import Store
from flows.compare import main
from tasks.run_table import Results
from vlm.config import EvaluationConfig
from vlm.errors import ConfigError
from vlm.evaluation.comparison_page import as_csv, as_html, as_text
from vlm.evaluation.evaluate import evaluate_predictions
from vlm.evaluation.predictions import Prediction, PredictionsSummary, write_predictions
from vlm.evaluation.report import render_report

EVALUATION = EvaluationConfig(metrics=("cer", "exact_match"))
NUM_ROWS = 24


class Runs:
    """A store with results of runs that differ in learning rate and in how many characters of ten are wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store.open(str(folder / "store"))
        self.digests: dict[str, str] = {}
        self.predictions: dict[str, str] = {}

    def add(self, name: str, num_wrong: int, learning_rate: float, first: int = 0) -> None:
        with self.store.staging() as stage:
            for kind in ("adapter", "predictions", "metrics", "report"):
                (stage / kind).mkdir()
            (stage / "adapter" / "weights").write_text(name)
            adapter = self.publish(stage / "adapter", "adapter", {})
            self.record("train", {"learning_rate": learning_rate, "seed": 0}, {}, "adapter", adapter)
            rows = []
            for i in range(NUM_ROWS):
                wrong = num_wrong + (i % 3 == 0)
                rows.append(Prediction(f"{first + i}", None, "", "a" * 10, "b" * wrong + "a" * (10 - wrong), 1, "stop"))
            write_predictions(rows, PredictionsSummary("test", NUM_ROWS, True, 0, NUM_ROWS), stage / "predictions")
            evaluate_predictions(stage / "predictions", None, EVALUATION, stage / "metrics")
            predictions = self.publish(stage / "predictions", "predictions", {"adapter": adapter.digest})
            self.record(
                "inference_mode.tuned", {"batch_size": 8}, {"adapter": adapter.digest}, "predictions", predictions
            )
            render_report(title=name, metrics_dir=stage / "metrics", output_dir=self.folder / name, provenance={})
            metrics = self.publish(stage / "metrics", "metrics", {"tuned": predictions.digest})
            inputs = {"tuned": predictions.digest}
            self.record("evaluate_and_save.metrics", {"metrics": ["cer"]}, inputs, "metrics", metrics)
            # What the registry and an evaluation note later hides nothing of how it was made.
            self.record("import_subject.adapter", {}, {}, "adapter", adapter)
            self.record("register_model.0", {}, {"metrics": metrics.digest}, "metrics", metrics)
            self.digests[name], self.predictions[name] = metrics.digest, predictions.digest

    def publish(self, folder: Path, kind: str, inputs: dict[str, str]) -> ArtifactRef:
        return self.store.publish(folder, kind=kind, provenance={"inputs": inputs}, consume=True)

    def record(self, unit: str, config: dict[str, Any], inputs: dict[str, str], output: str, ref: ArtifactRef) -> None:
        document = {"unit": unit, "version": 1, "code": "", "config": config, "inputs": inputs, "sources": {}}
        document["sources"] = {"which": ref.digest} if unit == "train" else {}
        self.store.record(unit, step_key(document), document, {output: ref}, {})

    @property
    def results(self) -> Results:
        return Results(self.store, "sqlite:///nowhere.db")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("runs"))
    made.add("first", 5, 1e-3)
    made.add("better", 2, 1e-4)
    made.add("elsewhere", 0, 1e-4, first=100)
    return made


def test_results_are_tested_on_the_same_rows(runs: Runs) -> None:
    results = [runs.results.find(runs.digests[name][:10]) for name in ("first", "better", "elsewhere")]
    compared = runs.results.compare(results)
    elsewhere, better, first = compared.rows  # best first
    assert first["is_reference"]
    difference = better["differences"]["cer"]
    assert difference.value == pytest.approx(-0.3)
    assert difference.verdict == "better"
    assert better["differences"]["exact_match"].verdict == "no clear difference"
    assert elsewhere["differences"] == {}
    assert elsewhere["notes"] == ["other rows"]


def test_only_settings_that_differ_are_shown(runs: Runs) -> None:
    results = [runs.results.find(runs.digests[name]) for name in ("first", "better")]
    compared = runs.results.compare(results)
    assert set(compared.settings) == {"training.learning_rate", "training.content"}
    rates = {row["name"][:8]: row["settings"]["training.learning_rate"] for row in compared.rows}
    assert rates == {runs.digests["first"][:8]: 1e-3, runs.digests["better"][:8]: 1e-4}


def test_a_page_alone_can_be_compared_but_not_tested(runs: Runs) -> None:
    results = [runs.results.find(runs.digests["first"]), runs.results.find(str(runs.folder / "better"))]
    better, _ = runs.results.compare(results).rows
    assert better["figures"]["cer"]["value"] == pytest.approx(0.2 + 0.1 / 3)
    assert better["notes"] == ["answers not in the store"]


def test_a_folder_of_the_store_is_the_artifact(runs: Runs) -> None:
    folder = runs.store.materialize(runs.digests["better"])
    assert runs.results.find(str(folder)).predictions == runs.predictions["better"]


def test_other_normalisation_is_noted(runs: Runs, tmp_path: Path) -> None:
    metrics = json.loads(runs.store.read_text(runs.digests["better"], "metrics.json"))
    metrics["normalization"]["ignore_case"] = True
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    results = [runs.results.find(runs.digests["first"]), runs.results.find(str(tmp_path))]
    assert "other normalization" in runs.results.compare(results).rows[0]["notes"]


def test_all_forms_say_the_same(runs: Runs) -> None:
    compared = runs.results.compare([runs.results.find(runs.digests[name]) for name in ("first", "better")])
    text, page = as_text(compared), as_html(compared)
    table = list(csv.DictReader(io.StringIO(as_csv(compared))))
    assert [row["name"] for row in table] == [runs.digests["better"], runs.digests["first"]]
    assert float(table[0]["cer_difference"]) == pytest.approx(-0.3)
    assert table[0]["cer_verdict"] == "better"
    assert table[0]["training.learning_rate"] == "0.0001"
    for shown in (text, page):
        assert "0.2333" in shown
        assert "better" in shown
        assert "training.learning_rate" in shown
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_without_names_the_newest_of_the_store_are_taken(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--store",
        str(runs.folder / "store"),
        "--html",
        str(tmp_path / "a.html"),
        "--csv",
        str(tmp_path / "a.csv"),
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for digest in runs.digests.values():
        assert digest[:12] in shown
    assert (tmp_path / "a.html").read_text().startswith("<!DOCTYPE html>")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "is no file or folder here"),
        (["abcdef0123"], "no artifact's digest starts with 'abcdef0123'"),
        (["{predictions}"], "is an artifact of kind 'predictions'"),
        (["run:0123"], "is not there; give the tracking address"),
        (["--against", "x"], "is none of the results"),
        (["--csv", "/proc/a.csv"], "cannot be written"),
        ([".."], "has neither metrics.json nor report.html"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    arguments: list[str],
    message: str,
    runs: Runs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.replace("{predictions}", runs.predictions["first"]) for word in arguments]
    assert main([*words, "--store", str(runs.folder / "store")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_empty_store_has_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no results yet"):
        Results(Store.open(str(tmp_path)), "").latest(5)
