"""The loss curve as plain numbers for an inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34


@dataclass(frozen=True)
class Line:
    """One drawn series."""

    name: str
    """Its legend."""
    points: str
    """SVG `points`, pixels from the top left corner."""
    last: tuple[float, float]
    """The last point, for a marker where there is only one."""


@dataclass(frozen=True)
class LossCurve:
    """Everything that the template draws."""

    width: int
    height: int
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    plot: tuple[float, float, float, float]
    """Left, top, right and bottom of the plot area in pixels."""
    description: str
    """The curve in words, for those who cannot see it."""


def loss_curve(entries: Sequence[Mapping[str, Any]]) -> LossCurve | None:
    """Lays out training and validation loss over the steps.

    Args:
        entries: Lines of ``metrics.jsonl``; those with `loss` or `eval_loss` are drawn.

    Returns:
        The layout, or None where there is no finite loss.
    """
    series = {
        name: [
            (float(entry["step"]), float(entry[key])) for entry in entries if key in entry and math.isfinite(entry[key])
        ]
        for name, key in (("Training loss", "loss"), ("Validation loss", "eval_loss"))
    }
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    steps = [step for points in series.values() for step, _ in points]
    top = max(loss for points in series.values() for _, loss in points) or 1.0
    first, last = min(steps), max(steps)
    plot = (_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM)

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return round(plot[0] + share * (plot[2] - plot[0]), 1)

    def y(loss: float) -> float:
        return round(plot[3] - loss / top * (plot[3] - plot[1]), 1)

    return LossCurve(
        width=WIDTH,
        height=HEIGHT,
        lines=tuple(
            Line(name, " ".join(f"{x(step)},{y(loss)}" for step, loss in points), (x(points[-1][0]), y(points[-1][1])))
            for name, points in series.items()
        ),
        x_ticks=tuple((x(step), f"{step:g}") for step in sorted({first, last})),
        y_ticks=tuple((y(loss), f"{loss:.3g}") for loss in (0.0, top / 2, top)),
        plot=plot,
        description="; ".join(
            f"{name} from {points[0][1]:.4g} at step {points[0][0]:g} to {points[-1][1]:.4g} at step {points[-1][0]:g}"
            for name, points in series.items()
        ),
    )
