"""The last lines of a run: what ran, what was there, how good the result is, and where it is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from artifacts.refs import ArtifactRef
from tasks.graph import STEPS, Json
from tasks.session import Session
from vlm.config.evaluation import ExportType


def summarise(
    session: Session, metrics: ArtifactRef, report: ArtifactRef, exports: Mapping[ExportType, ArtifactRef]
) -> Json:
    """Everything that the last lines say, as plain values.

    Args:
        session: The finished run.
        metrics: Its metrics artifact.
        report: Its report artifact.
        exports: Its exports by type.
    """
    steps = {}
    for name in STEPS:
        results = [result for unit, result in session.results.items() if unit.split(".", 1)[0] == name]
        ran = [result.unit for result in results if not result.cached]
        steps[name] = {"cached": not ran, "ran": ran, "wall_seconds": round(sum(r.wall_seconds for r in results), 1)}
    locations = _locations(session, report, exports)
    return {
        "steps": steps,
        "metrics": json.loads(session.store.read_text(metrics, "metrics.json")),
        "locations": locations,
        "artifacts": {
            f"{unit}.{output}": ref.digest
            for unit, result in session.results.items()
            for output, ref in result.outputs.items()
        },
    }


def format_summary(summary: Json) -> str:
    """The summary as lines that fit a screen."""
    steps = summary["steps"]
    cached = [name for name, step in steps.items() if step["cached"]]
    ran = [f"{name} {step['wall_seconds']:.1f} s" for name, step in steps.items() if not step["cached"]]
    lines = [f"ran      {', '.join(ran) or 'nothing'}", f"cached   {', '.join(cached) or 'nothing'}"]
    metrics = summary["metrics"]
    width = max(12, *(len(name) + 2 for name in metrics["metrics"]))
    for name, figures in metrics["metrics"].items():
        tuned, base = figures["tuned"], figures.get("base")
        text = f"{name:<{width}}{tuned['value']:.4f}  [{tuned['low']:.4f}, {tuned['high']:.4f}]"
        if base is not None:
            text += f"   base model {base['value']:.4f}"
        lines.append(f"metric   {text}")
    lines.append(f"         on {metrics['num_rows']} {metrics['split']} rows; in brackets the 95 % interval")
    lines += [f"{name:<8} {where}" for name, where in summary["locations"].items()]
    return "\n".join(lines)


def metric_figures(summary: Json) -> dict[str, float]:
    """The metrics as flat names and values, for experiment tracking."""
    figures = {}
    for name, of_models in summary["metrics"]["metrics"].items():
        for which in ("tuned", "base"):
            if of_models.get(which) is not None:
                figures[f"{which}_{name}"] = float(of_models[which]["value"])
    return figures


def _locations(session: Session, report: ArtifactRef, exports: Mapping[ExportType, ArtifactRef]) -> dict[str, str]:
    adapter = session.results["train"].outputs["adapter"]
    wanted: dict[str, ArtifactRef] = {"adapter": exports.get("lora", adapter), "report": report}
    wanted |= {name: ref for name, ref in exports.items() if name != "lora"}
    root = session.local_root
    where = {}
    for name, ref in wanted.items():
        if root is None:
            where[name] = f"{session.config.runtime.store} artifact {ref.digest}"
            continue
        link = _link(root.parent / "latest" / name, session.local(ref))
        where[name] = str(link / "report.html" if name == "report" else link)
    if session.config.export.destination is not None:
        where["copies"] = session.config.export.destination
    if session.tracker is not None:
        where["runs"] = f"mlflow ui --backend-store-uri {session.tracker.uri}"
    return where


def _link(link: Path, target: Path) -> Path:
    """Points a short, stable name at the newest artifact; replaced in one step, so that it is never missing."""
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)
    return Path(os.path.relpath(link)) if link.is_relative_to(Path.cwd()) else link
