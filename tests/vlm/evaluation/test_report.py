import html.parser
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from vlm.config import EvaluationConfig
from vlm.errors import DataError
from vlm.evaluation.evaluate import evaluate_predictions
from vlm.evaluation.loss_curve import loss_curve
from vlm.evaluation.predictions import Prediction, PredictionsSummary, write_predictions
from vlm.evaluation.report import render_report, text_difference, worst_first

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
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br", "img"}:
            self.open.append(tag)

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
        ledger={"unreadable image": 3},
        configuration={"a": HOSTILE},
        provenance={"dataset": "ab12"},
    )
    assert "<script" not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "url(" not in text
    page = Page(text)
    assert not page.open
    tags = [tag for tag, _ in page.tags]
    assert dict(page.tags)["html"]["lang"] == "en"
    assert tags.count("h1") == 1
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == [f"Image 1 of row {HOSTILE}", "Image 1 of row row-0"]  # worst first
    assert int(images[0]["height"]) == 640
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert all("caption" in tags[i : i + 2] for i, tag in enumerate(tags) if tag == "table")
    assert "Training loss from 2 at step 1 to 0.5 at step 9" in text
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
        assert worst_first(rows, {"metrics": {lead: {"better": better}}}) == expected


def test_loss_curve_scales_to_the_plot() -> None:
    curve = loss_curve([{"step": 0, "loss": 4.0}, {"step": 10, "loss": 2.0}, {"step": 5, "loss": float("nan")}])
    assert curve is not None
    left, top, right, bottom = curve.plot
    assert curve.lines[0].points == f"{left:.1f},{top:.1f} {right:.1f},{(top + bottom) / 2:.1f}"
    assert loss_curve([{"step": 1, "loss": float("nan")}]) is None
