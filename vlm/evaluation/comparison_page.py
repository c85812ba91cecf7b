"""Several results in one table: as text, as CSV, and as a page that can be mailed."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import Any

from vlm.evaluation.pages import beside, raw, template


@dataclass(frozen=True)
class Difference:
    """A paired difference to the reference."""

    value: float
    """This result minus the reference."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end."""
    p_value: float | None
    """Of the paired test, where one was computed."""
    verdict: str
    """``better``, ``worse`` or ``no clear difference``."""


@dataclass(frozen=True)
class Compared:
    """The content of the table."""

    reference: str
    """Name of the result that the others are tested against."""
    titles: dict[str, str]
    """Titles of the metrics by name; the first one leads."""
    better: dict[str, str]
    """``lower`` or ``higher`` by metric."""
    settings: tuple[str, ...]
    """Settings in which the results differ."""
    rows: tuple[dict[str, Any], ...]
    """Best first: `name`, `is_reference`, `num_rows`, `split`, `digest`, `figures` (value, low and high by metric, or
    None), `differences` by metric, `settings` by name, `notes`."""


def as_text(compared: Compared) -> str:
    """The table as lines of text."""
    header = ["", *compared.titles, "rows", "against"]
    lines = [header]
    lead = next(iter(compared.titles))
    for row in compared.rows:
        figures = [_interval(row["figures"][name]) for name in compared.titles]
        lines.append([row["name"], *figures, str(row["num_rows"]), _judged(row, lead)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if compared.settings:
        shown += ["", "settings in which they differ"]
        width = max(len(row["name"]) for row in compared.rows)
        for row in compared.rows:
            chosen = "  ".join(f"{name}={_plain(row['settings'][name])}" for name in compared.settings)
            shown.append(f"{row['name']:<{width}}  {chosen}")
    shown += ["", *_legend(compared)]
    return "\n".join(shown)


def as_csv(compared: Compared) -> str:
    """The table as CSV: one line per result, one column per figure and per differing setting."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = ["name", "metrics_digest", "split", "num_rows"]
    for name in compared.titles:
        columns += [f"{name}{part}" for part in ("", "_low", "_high", "_difference", "_p_value", "_verdict")]
    writer.writerow([*columns, *compared.settings, "notes"])
    for row in compared.rows:
        cells: list[Any] = [row["name"], row["digest"] or "", row["split"], row["num_rows"]]
        for name in compared.titles:
            figure, difference = row["figures"][name], row["differences"].get(name)
            cells += ["", "", ""] if figure is None else [figure["value"], figure["low"], figure["high"]]
            cells += ["", "", ""] if difference is None else [difference.value, difference.p_value, difference.verdict]
        cells += [_plain(row["settings"][name]) for name in compared.settings]
        writer.writerow([*cells, "; ".join(row["notes"])])
    return buffer.getvalue()


def as_html(compared: Compared) -> str:
    """The table as a self-contained page in the report's style, without any script."""
    return template("comparison.html.j2").render(
        compared=compared, style=raw(beside("report.css")), plain=_plain, legend=_legend(compared)
    )


def _legend(compared: Compared) -> list[str]:
    lines = ["In brackets: 95 % intervals of each result by itself."]
    if len(compared.rows) > 1:
        lines.append(
            f"Tested on the same rows against {compared.reference}; a difference is called clear where its paired 95 %"
            " interval excludes zero and the paired test, where there is one, gives p < 0.05. Not corrected for the number of"
            " comparisons."
        )
    return lines


def _interval(figure: dict[str, float] | None) -> str:
    return "–" if figure is None else f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]"


def _judged(row: dict[str, Any], lead: str) -> str:
    if row["is_reference"]:
        return "reference"
    difference = row["differences"].get(lead)
    parts = []
    if difference is not None:
        p_value = "" if difference.p_value is None else f", p = {difference.p_value:.3g}"
        parts.append(f"{difference.verdict} ({difference.value:+.4f}{p_value})")
    return "; ".join([*parts, *row["notes"]])


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
