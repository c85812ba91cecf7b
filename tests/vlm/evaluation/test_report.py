import base64
import hashlib
import html.parser
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from vlm.config import EvaluationConfig
from vlm.errors import DataError
from vlm.evaluation.curves import charts
from vlm.evaluation.differences import MAX_CHARACTERS, text_difference, visible
from vlm.evaluation.evaluate import evaluate_predictions
from vlm.evaluation.predictions import Prediction, PredictionsSummary, write_predictions
from vlm.evaluation.report import failure_counts, render_report, slice_tables
from vlm.evaluation.report_rows import MAX_PICTURES_BYTES, picture, shown_rows
from vlm.evaluation.scores import worst_first
from vlm.evaluation.verdicts import verdict

HOSTILE = "<script>alert('x')</script>"


@dataclass
class Row:
    id: str
    images: list[np.ndarray]


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br", "img", "input", "line", "polyline", "circle"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    for name, last in (("tuned", "god"), ("base", "")):
        (tmp_path / name).mkdir()
        rows = [
            Prediction("row-0", None, "p", "cat", "cat", 1, "stop"),
            Prediction(HOSTILE, None, "p", "dog", last + HOSTILE, 1, "length"),
        ]
        write_predictions(rows, PredictionsSummary("test", 2, name == "tuned", 2, 1), tmp_path / name)
    folder = tmp_path / "metrics"
    folder.mkdir()
    evaluate_predictions(tmp_path / "tuned", tmp_path / "base", EvaluationConfig(), folder)
    return folder


def render(scored: Path, tmp_path: Path, **more: object) -> str:
    return render_report(title="Run", metrics_dir=scored, output_dir=tmp_path, **more).read_text()


def test_page_is_self_contained_escaped_and_accessible(scored: Path, tmp_path: Path) -> None:
    training = tmp_path / "training"
    training.mkdir()
    (training / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 9, "loss": 0.5}\n{"step": 9, "eval_loss": 0.7}\n'
    )
    rows = [Row("row-0", [np.zeros((8, 12, 3), np.uint8)]), Row(HOSTILE, [np.full((2000, 900, 3), 255, np.uint8)])]
    text = render(
        scored,
        tmp_path,
        rows=rows,
        training_dir=training,
        plan={
            "num_steps": 9,
            "memory": {"weights_bytes": 5_400_000_000},
            "dtype": "bfloat16",
            "device_memory_bytes": None,
        },
        ledger={"unreadable image": 3},
        configuration={"a": HOSTILE},
        provenance={"dataset": "ab12"},
    )
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert "url(" not in text
    page = Page(text)
    assert not page.open
    assert HOSTILE not in text
    # One script of ours, named by its hash, and one block of data that no browser runs.
    script = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    data, code = page.scripts
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in script
    assert "default-src 'none'" in script
    assert json.loads(data)["metrics"]["num_rows"] == 2
    tags = [tag for tag, _ in page.tags]
    assert dict(page.tags)["html"]["lang"] == "en"
    assert tags.count("h1") == 1
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == [f"Image 1 of row {HOSTILE}", "Image 1 of row row-0"]  # worst first
    assert int(images[0]["height"]) == 640
    for landmark in ("main", "header", "nav"):
        assert tags.count(landmark) == 1
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointed = [attributes["href"].removeprefix("#") for tag, attributes in page.tags if tag == "a"]
    pointed += [attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes]
    pointed += [attributes["for"] for tag, attributes in page.tags if tag == "label"]
    assert set(pointed) <= set(ids)
    fields = {attributes["id"] for tag, attributes in page.tags if tag in ("input", "select")}
    assert fields == {attributes["for"] for tag, attributes in page.tags if tag == "label"}
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert all("caption" in tags[i : i + 2] for i, tag in enumerate(tags) if tag == "table")
    assert "Training loss from 2 at step 1 to 0.5 at step 9" in text
    assert "memory: weights" in text
    assert "5.40 GB" in text
    assert "device memory" not in text
    assert "unreadable image" in text
    assert "ab12" in text
    assert "stopped at the length limit" in text


def test_page_without_optional_parts(scored: Path, tmp_path: Path) -> None:
    text = render(scored, tmp_path)
    assert "<svg" not in text
    assert "Ledger" not in text
    assert text == render(scored, tmp_path)


def test_another_dataset_is_refused(scored: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1 of the metrics"):
        render(scored, tmp_path, rows=[Row("row-0", []), Row("other", [])])


def test_difference_spells_both_texts() -> None:
    segments = text_difference("the cat", "that cat!")
    assert "".join(text for kind, text in segments if kind != "missing") == "that cat!"
    assert "".join(text for kind, text in segments if kind != "extra") == "the cat"


def test_worst_first_follows_the_leading_metric() -> None:
    rows = [{"tuned": {"exact_match": 1.0, "cer": 0.9}}, {"tuned": {"exact_match": 0.0, "cer": 0.1}}]
    for lead, better, expected in (("exact_match", "higher", [1, 0]), ("cer", "lower", [0, 1])):
        assert worst_first(rows, {lead: {"better": better}}) == expected


def test_loss_curve_scales_to_the_plot() -> None:
    (chart,) = charts([{"step": 0, "loss": 4.0}, {"step": 10, "loss": 2.0}, {"step": 5, "loss": float("nan")}])
    left, top, right, bottom = chart.plot
    assert chart.lines[0].points == f"{left:.1f},{top:.1f} {right:.1f},{(top + bottom) / 2:.1f}"
    assert [label for _, label in chart.y_ticks] == ["0", "1", "2", "3", "4"]
    assert [label for _, label in chart.x_ticks] == ["0", "2", "4", "6", "8", "10"]
    assert charts([{"step": 1, "loss": float("nan")}]) == []


def test_generated_metrics_have_their_own_charts() -> None:
    entries = [{"step": 1, "loss": 3.0}, {"step": 5, "eval_cer": 0.5, "eval_loss": 1.0}, {"step": 9, "eval_cer": 0.25}]
    loss, cer = charts(entries)
    assert [line.name for line in loss.lines] == ["Training loss", "Validation loss"]
    assert "from 0.5 at step 5 to 0.25 at step 9" in cer.description


@pytest.mark.parametrize(
    ("target", "prediction", "segments"),
    [
        ("", "", []),
        ("same", "same", [("same", "same")]),
        ("kitten", "sitten", [("missing", "k"), ("extra", "s"), ("same", "itten")]),
        ("abcd", "wxyz", [("missing", "abcd"), ("extra", "wxyz")]),  # nothing in common: shown apart
        ("ab", "", [("missing", "ab")]),
        ("a" * (MAX_CHARACTERS + 1), "a", [("missing", "a" * (MAX_CHARACTERS + 1)), ("extra", "a")]),
    ],
)
def test_marked_differences(target: str, prediction: str, segments: list) -> None:
    assert text_difference(target, prediction) == segments


def test_marked_white_space_can_be_seen() -> None:
    assert visible("  ") == "␣␣"
    assert visible("a\nb") == "a⏎\nb"


def difference(value: float, low: float, high: float, **more: float) -> dict:
    return {"value": value, "low": low, "high": high, **more}


@pytest.mark.parametrize(
    ("better", "paired", "expected"),
    [
        ("lower", difference(-0.1, -0.2, -0.05), "better"),
        ("higher", difference(-0.1, -0.2, -0.05), "worse"),
        ("higher", difference(0.1, 0.05, 0.2, p_value=0.01), "better"),
        ("lower", difference(-0.1, -0.2, 0.0), "no clear difference"),
        ("lower", difference(-0.1, -0.2, -0.05, p_value=0.06), "no clear difference"),
        ("lower", None, None),
    ],
)
def test_a_verdict_needs_the_interval_and_the_test(better: str, paired: dict | None, expected: str | None) -> None:
    assert verdict({"better": better, "difference": paired}) == expected


def test_slices_and_failures_of_either_shape() -> None:
    metrics = {
        "metrics": {"cer": {}, "wer": {}},
        "slices": {
            "shop": {
                "A": {"num_rows": 2, "cer": 0.5},
                "B": {"num_rows": 3, "cer": {"tuned": 0.1, "base": {"value": 0.2}}, "wer": {"value": 0.3}},
            }
        },
    }
    assert slice_tables(metrics) == {
        "shop": [
            {"value": "B", "num_rows": 3, "cells": [(0.1, 0.2), (0.3, None)]},
            {"value": "A", "num_rows": 2, "cells": [(0.5, None), (None, None)]},
        ]
    }
    assert failure_counts({"failures": {"empty": 3, "repetition": 5}}, []) == [
        ("repetition", 5, None),
        ("empty", 3, None),
    ]
    assert failure_counts(
        {"failures": {"empty": {"tuned": 0, "base": 2}, "wrong case": {"tuned": 0, "base": 0}}}, []
    ) == [("empty", 0, 2)]
    assert failure_counts({"failures": {"tuned": {"empty": 1}, "base": {"empty": 2, "cut": 4}}}, []) == [
        ("empty", 1, 2),
        ("cut", 0, 4),
    ]
    stopped, cut = (
        {"target": "a", who: {"prediction": "b", "finish_reason": reason}}
        for who, reason in (("tuned", "stop"), ("tuned", "length"))
    )
    assert failure_counts({}, [stopped, cut]) == [("truncated", 1, None)]


def test_an_answer_is_marked_against_the_nearest_right_one() -> None:
    row = {
        "id": "r",
        "target": "seven",
        "references": ["seven", "7"],
        "tuned": {"prediction": "7", "finish_reason": "stop", "cer": 1.0},
    }
    (shown,) = shown_rows([row], None, {"metrics": {"cer": {"title": "CER", "better": "lower"}}})
    assert shown["also_right"] == ["7"]
    assert shown["kinds"] == ["right"]
    assert shown["answers"][0]["segments"] == [("same", "7")]


def test_pictures_of_photographs_are_small_and_all_together_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    assert picture(noise)["uri"].startswith("data:image/jpeg")
    assert picture(np.zeros((40, 40, 3), np.uint8))["uri"].startswith("data:image/png")
    scored = [
        {"id": f"{i}", "target": "a", "tuned": {"prediction": "a", "finish_reason": "stop", "cer": 0.0}}
        for i in range(3)
    ]
    metrics = {"metrics": {"cer": {"title": "CER", "better": "lower"}}}
    rows = [Row(f"{i}", [np.zeros((40, 40, 3), np.uint8)]) for i in range(3)]
    size_bytes = len(picture(rows[0].images[0])["uri"])
    monkeypatch.setattr("vlm.evaluation.report_rows.MAX_PICTURES_BYTES", 2 * size_bytes)
    assert 2 * size_bytes < MAX_PICTURES_BYTES
    assert [(len(row["pictures"]), row["num_left_out"]) for row in shown_rows(scored, rows, metrics)] == [
        (1, 0),
        (1, 0),
        (0, 1),
    ]
