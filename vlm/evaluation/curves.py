"""Curves of a training as plain numbers for inline SVG: losses in one chart, each generated metric in its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.evaluation.metrics import METRICS

WIDTH, HEIGHT = 640, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 16, 14, 50
_LOSSES = (("Training loss", "loss"), ("Validation loss", "eval_loss"))
# How answers generated during training are logged; the rest of the name is the metric's.
_GENERATED = ("generated_", "eval_")


@dataclass(frozen=True)
class Line:
    """One drawn series."""

    name: str
    """Its legend."""
    points: str
    """SVG `points`, pixels from the top left corner."""
    last: tuple[float, float]
    """The last point, for a marker where there is only one."""
    values: tuple[tuple[str, str], ...]
    """Step and value of every point as text, for a table."""


@dataclass(frozen=True)
class Chart:
    """Everything that the template draws."""

    title: str
    width: int
    height: int
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    plot: tuple[float, float, float, float]
    """Left, top, right and bottom of the plot area in pixels."""
    description: str
    """The curves in words, for those who cannot see them."""


def charts(entries: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Lays out everything that a training logged about quality over its steps.

    Args:
        entries: Lines of ``metrics.jsonl``. Drawn are `loss`, `eval_loss`, and metrics by the names of the table.

    Returns:
        The losses first; nothing for what has no finite value.
    """
    groups: list[tuple[str, tuple[tuple[str, str], ...]]] = [("Loss", _LOSSES)]
    for name, metric in METRICS.items():
        keys = [f"{prefix}{name}" for prefix in _GENERATED]
        key = next((key for key in keys if any(key in entry for entry in entries)), None)
        if key is not None:
            groups.append((f"{metric.title} of generated answers", ((metric.title, key),)))
    found = (_chart(title, {name: _series(entries, key) for name, key in lines}) for title, lines in groups)
    return [chart for chart in found if chart is not None]


def _series(entries: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [
        (float(entry["step"]), float(entry[key]))
        for entry in entries
        if isinstance(entry.get(key), int | float) and math.isfinite(entry[key])
    ]


def _chart(title: str, series: dict[str, list[tuple[float, float]]]) -> Chart | None:
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    steps = [step for points in series.values() for step, _ in points]
    values = [value for points in series.values() for _, value in points]
    first, last = min(steps), max(steps)
    y_values = _ticks(min(0.0, *values), max(values) or 1.0)
    bottom, top = y_values[0], max(y_values[-1], max(values))
    plot = (_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM)

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return round(plot[0] + share * (plot[2] - plot[0]), 1)

    def y(value: float) -> float:
        return round(plot[3] - (value - bottom) / (top - bottom) * (plot[3] - plot[1]), 1)

    return Chart(
        title=title,
        width=WIDTH,
        height=HEIGHT,
        lines=tuple(
            Line(
                name,
                " ".join(f"{x(step)},{y(value)}" for step, value in points),
                (x(points[-1][0]), y(points[-1][1])),
                tuple((f"{step:g}", f"{value:.4g}") for step, value in points),
            )
            for name, points in series.items()
        ),
        x_ticks=tuple((x(step), f"{step:g}") for step in _step_ticks(first, last)),
        y_ticks=tuple((y(value), f"{value:g}") for value in y_values),
        plot=plot,
        description="; ".join(
            f"{name} from {points[0][1]:.4g} at step {points[0][0]:g} to {points[-1][1]:.4g} at step {points[-1][0]:g}"
            for name, points in series.items()
        ),
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, four to seven of them."""
    width = _round_width((high - low) / 4)
    start, end = math.floor(low / width + 1e-9), math.ceil(high / width - 1e-9)
    return [round(number * width, 12) for number in range(start, end + 1)]


def _step_ticks(first: float, last: float) -> list[float]:
    """Round steps in the range, with its ends; none so close to an end that the labels would touch."""
    if first == last:
        return [first]
    width = max(1.0, _round_width((last - first) / 5))
    inner = [number * width for number in range(math.ceil(first / width), math.floor(last / width) + 1)]
    return [first, *(step for step in inner if min(step - first, last - step) > width / 2), last]


def _round_width(raw: float) -> float:
    """The 1, 2, 2.5 or 5 times a power of ten at or above a number."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
