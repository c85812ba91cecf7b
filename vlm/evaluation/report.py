"""One self-contained HTML page: metrics, loss curve, the worst rows with their pictures, and where it all came from.

No external asset and no script: the page can be mailed, and opens offline. Everything that comes from data goes
through jinja2's autoescape.
"""

from __future__ import annotations

import base64
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vlm.errors import DataError
from vlm.evaluation.evaluate import METRICS_FILE, ROWS_FILE
from vlm.evaluation.loss_curve import LossCurve, loss_curve
from vlm.families.video import Video

MAX_ROWS = 40
MAX_PICTURE_SIDE_PX = 640
# difflib is quadratic on texts without much in common; past this the two texts are shown without marks.
MAX_DIFF_CHARACTERS = 4000

Segments = list[tuple[str, str]]


class ImageRows(Protocol):
    """What the report needs of a prepared split."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, index: int, /) -> Any:
        """A row with `id` and `images`."""


def render_report(
    *,
    title: str,
    metrics_dir: Path,
    output_dir: Path,
    rows: ImageRows | None = None,
    training_dir: Path | None = None,
    ledger: Mapping[str, int] | None = None,
    configuration: Mapping[str, Any] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Path:
    """Writes ``report.html``.

    Args:
        title: Heading of the page.
        metrics_dir: What ``evaluate_predictions`` wrote.
        output_dir: An existing folder.
        rows: The evaluated split, for its pictures; rows are matched by position and checked by id.
        training_dir: Folder with ``metrics.jsonl``, for the loss curve.
        ledger: Count of dropped or changed rows by reason.
        configuration: The run's configuration as plain values.
        provenance: Versions and digests by name.

    Returns:
        Path of the page.

    Raises:
        DataError: `rows` are not the rows that were scored.
    """
    import jinja2

    metrics = json.loads((metrics_dir / METRICS_FILE).read_text(encoding="utf-8"))
    with (metrics_dir / ROWS_FILE).open(encoding="utf-8", newline="\n") as handle:
        scored = [json.loads(line) for line in handle]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlm.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        metrics=metrics,
        worst=[
            _shown_row(scored[position], position, rows, metrics)
            for position in worst_first(scored, metrics)[:MAX_ROWS]
        ],
        num_scored=len(scored),
        curve=_curve(training_dir),
        ledger=dict(ledger or {}),
        configuration=json.dumps(configuration, indent=2, sort_keys=True, ensure_ascii=False) if configuration else "",
        provenance=dict(provenance or {}),
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "report.html"
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def worst_first(scored: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[int]:
    """Orders rows by the leading metric of the tuned model.

    Args:
        scored: The rows of ``rows.jsonl``.
        metrics: The content of ``metrics.json``.

    Returns:
        Positions in `scored`, worst first, ties in row order.
    """
    name, entry = next(iter(metrics["metrics"].items()))
    sign = -1 if entry["better"] == "lower" else 1
    return sorted(range(len(scored)), key=lambda position: (sign * scored[position]["tuned"][name], position))


def text_difference(target: str, prediction: str) -> Segments:
    """Aligns a prediction with its target, character by character.

    Args:
        target: Expected text.
        prediction: Generated text.

    Returns:
        Pairs ``(kind, text)`` with kind ``same``, ``missing`` (in the target only) or ``extra`` (in the prediction
        only). The texts of ``same`` and ``extra`` together spell the prediction.
    """
    if max(len(target), len(prediction)) > MAX_DIFF_CHARACTERS:
        return [("same", prediction)]
    segments: Segments = []
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, target, prediction, autojunk=False).get_opcodes():
        if kind == "equal":
            segments.append(("same", prediction[b0:b1]))
            continue
        if a1 > a0:
            segments.append(("missing", target[a0:a1]))
        if b1 > b0:
            segments.append(("extra", prediction[b0:b1]))
    return segments


def _shown_row(
    row: Mapping[str, Any], position: int, rows: ImageRows | None, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    pictures = []
    if rows is not None:
        source = rows[position] if position < len(rows) else None
        if source is None or source.id != row["id"]:
            found = "nothing" if source is None else repr(source.id)
            raise DataError(
                f"row {position} of the metrics is {row['id']!r} but the dataset has {found} there;"
                " give the report the dataset that the predictions were made from"
            )
        # Of a video, the first frame.
        pictures = [_data_uri(image.frames[0] if isinstance(image, Video) else image) for image in source.images]
    answers = []
    for who, label in (("tuned", "Tuned model"), ("base", "Base model")):
        if who in row:
            answers.append(
                {
                    "label": label,
                    "segments": text_difference(row["target"], row[who]["prediction"]),
                    "cut": row[who]["finish_reason"] == "length",
                    "values_shown": [
                        (metrics["metrics"][name]["title"], row[who][name]) for name in metrics["metrics"]
                    ],
                }
            )
    return {"id": row["id"], "target": row["target"], "pictures": pictures, "answers": answers}


def _data_uri(pixels: Any) -> dict[str, Any]:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((MAX_PICTURE_SIDE_PX, MAX_PICTURE_SIDE_PX))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"uri": f"data:image/png;base64,{encoded}", "width": image.width, "height": image.height}


def _curve(training_dir: Path | None) -> LossCurve | None:
    if training_dir is None:
        return None
    with (training_dir / "metrics.jsonl").open(encoding="utf-8") as handle:
        return loss_curve([json.loads(line) for line in handle])
