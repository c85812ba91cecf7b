"""One self-contained HTML page: metrics, curves, slices, the worst rows with their pictures, and where it all came from.

No external asset: the page can be mailed, and opens offline. Its one script only filters and pages rows, which are all
there without it; a content policy names that script by its hash and forbids everything else, so that nothing in the
data can run, on top of jinja2's autoescape.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.evaluation.curves import Chart, charts
from vlm.evaluation.evaluate import METRICS_FILE, ROWS_FILE
from vlm.evaluation.pages import beside, raw, template
from vlm.evaluation.report_data import DATA_ID, data_block
from vlm.evaluation.report_rows import ImageRows, row_kinds, shown_rows
from vlm.evaluation.verdicts import verdict

REPORT_FILE = "report.html"


def render_report(
    *,
    title: str,
    metrics_dir: Path,
    output_dir: Path,
    rows: ImageRows | None = None,
    training_dir: Path | None = None,
    plan: Mapping[str, Any] | None = None,
    ledger: Mapping[str, int] | None = None,
    configuration: Mapping[str, Any] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Path:
    """Writes ``report.html``.

    Args:
        title: Heading of the page.
        metrics_dir: What ``evaluate_predictions`` wrote.
        output_dir: Receives the page; made if it is not there.
        rows: The evaluated split, for its pictures; rows are matched by position and checked by id.
        training_dir: Folder with ``metrics.jsonl``, for the curves, and ``training.json``.
        plan: Content of ``plan.json``.
        ledger: Count of dropped or changed rows by reason.
        configuration: The run's configuration as plain values.
        provenance: Versions and digests by name.

    Returns:
        Path of the page.

    Raises:
        DataError: `rows` are not the rows that were scored.
    """
    metrics = json.loads((metrics_dir / METRICS_FILE).read_text(encoding="utf-8"))
    with (metrics_dir / ROWS_FILE).open(encoding="utf-8", newline="\n") as handle:
        scored = [json.loads(line) for line in handle]
    script = beside("report.js")
    shown = shown_rows(scored, rows, metrics)
    page = template("report.html.j2").render(
        title=title,
        style=raw(beside("report.css")),
        script=raw(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        data_id=DATA_ID,
        data=raw(data_block(metrics, provenance or {})),
        metrics=metrics,
        has_base=any("base" in row for row in scored),
        verdicts={name: verdict(entry) for name, entry in metrics["metrics"].items()},
        slices=slice_tables(metrics),
        failures=failure_counts(metrics, scored),
        worst=shown,
        kinds=sorted({kind for row in shown for kind in row["kinds"]}),
        num_scored=len(scored),
        charts=_charts(training_dir),
        facts=_facts(training_dir, plan),
        ledger=dict(ledger or {}),
        configuration=json.dumps(configuration, indent=2, sort_keys=True, ensure_ascii=False) if configuration else "",
        provenance=dict(provenance or {}),
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / REPORT_FILE
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def slice_tables(metrics: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The slices of ``metrics.json`` as table rows.

    Args:
        metrics: Its content; without `slices` there are none.

    Returns:
        By column, one entry per value with `value`, `num_rows`, and `cells`: per metric the tuned and the base model's
        figure, None where there is none. Largest slices first.
    """
    tables = {}
    for column, values in metrics.get("slices", {}).items():
        entries = [
            {
                "value": name,
                "num_rows": figures["num_rows"],
                "cells": [_both(figures.get(metric)) for metric in metrics["metrics"]],
            }
            for name, figures in values.items()
        ]
        tables[column] = sorted(entries, key=lambda entry: -entry["num_rows"])
    return tables


def failure_counts(
    metrics: Mapping[str, Any], scored: Sequence[Mapping[str, Any]]
) -> list[tuple[str, float | None, float | None]]:
    """How many answers failed in which way.

    Args:
        metrics: Content of ``metrics.json``; its `failures` count.
        scored: The rows of ``rows.jsonl``, counted where there are no `failures`.

    Returns:
        Kind, number of the tuned model's and of the base model's answers (None where unknown); most frequent first, none that never happened.
    """
    failures = metrics.get("failures")
    if failures is None:
        models = [who for who in ("tuned", "base") if any(who in row for row in scored)]
        counts = {
            who: Counter(kind for row in scored for kind in row_kinds(row, who) if kind not in ("right", "wrong"))
            for who in models
        }
        failures = {kind: {who: counts[who][kind] for who in models} for kind in set().union(*counts.values())}
    if set(failures) & {"tuned", "base"}:
        tuned, base = (failures.get(who) or {} for who in ("tuned", "base"))
        failures = {
            kind: {"tuned": tuned.get(kind, 0), "base": base.get(kind, 0) if base else None} for kind in tuned | base
        }
    counted = [(kind, *_both(count)) for kind, count in failures.items()]
    counted = [entry for entry in counted if entry[1] or entry[2]]
    return sorted(counted, key=lambda entry: (-(entry[1] or 0), entry[0]))


def _both(figure: Any) -> tuple[float | None, float | None]:
    """Tuned and base figure of an entry that is a number, ``{"value": …}``, or holds one of these per model."""
    if not isinstance(figure, Mapping):
        return figure, None
    if "value" in figure:
        base = figure.get("base")
        return figure["value"], _both(base)[0]
    return _both(figure.get("tuned"))[0], _both(figure.get("base"))[0]


def _charts(training_dir: Path | None) -> list[Chart]:
    if training_dir is None:
        return []
    with (training_dir / "metrics.jsonl").open(encoding="utf-8") as handle:
        return charts([json.loads(line) for line in handle])


def _facts(training_dir: Path | None, plan: Mapping[str, Any] | None) -> dict[str, dict[str, str]]:
    """Tables of single facts by heading."""
    found = {}
    if training_dir is not None and (training_dir / "training.json").is_file():
        found["Training"] = _flat(json.loads((training_dir / "training.json").read_text(encoding="utf-8")))
    if plan:
        found["Plan"] = _flat(plan)
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    leaves: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _flat(value, f"{prefix}{_words(name)}: ")
        elif value is not None:
            leaves[f"{prefix}{_words(name)}"] = _quantity(name, value)
    return leaves


def _words(name: str) -> str:
    for start, full in (("num_", "number of "),):
        if name.startswith(start):
            name = full + name.removeprefix(start)
    return name.removesuffix("_bytes").replace("_", " ")


def _quantity(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, int | float):
        return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if name == "image_sizes":
        return ", ".join(f"{height} × {width} pixels" for height, width in value)
    return str(value)
