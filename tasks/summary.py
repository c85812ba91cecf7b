"""The last lines of a run: what ran, what was there, how good the result is, and where it is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from artifacts.refs import ArtifactRef
from tasks.graph import STEPS, Json
from tasks.session import Session
from tasks.tracking import viewer
from vlm.config.evaluation import ExportType
from vlm.evaluation.verdicts import verdict
from vlm.redaction import without_secrets


def summarise(
    session: Session,
    metrics: ArtifactRef,
    report: ArtifactRef,
    exports: Mapping[ExportType, ArtifactRef],
    registered: Json | None = None,
) -> Json:
    """Everything that the last lines say, as plain values.

    Args:
        session: The finished run.
        metrics: Its metrics artifact.
        report: Its report artifact.
        exports: Its exports by type.
        registered: What the model registry made of it.
    """
    steps = step_outcomes(session, STEPS)
    locations = _locations(session, report, exports)
    return {
        "steps": steps,
        "metrics": json.loads(session.store.read_text(metrics, "metrics.json")),
        "locations": locations,
        "registered": registered,
        "artifacts": {
            f"{unit}.{output}": ref.digest
            for unit, result in session.results.items()
            for output, ref in result.outputs.items()
        },
    }


def step_outcomes(session: Session, steps: Sequence[str]) -> Json:
    """What became of each step: whether it was cached, which units ran, and how long they took.

    Args:
        session: The finished run.
        steps: The steps of the flow, in order; those that had nothing to do are left out.
    """
    outcomes = {}
    for name in steps:
        results = [result for unit, result in session.results.items() if unit.split(".", 1)[0] == name]
        ran = [result.unit for result in results if not result.cached]
        if results:
            seconds = round(sum(result.wall_seconds for result in results), 1)
            outcomes[name] = {"cached": not ran, "ran": ran, "wall_seconds": seconds}
    return outcomes


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
    if registered := summary.get("registered"):
        holds = "champion" if registered["champion"] else "not champion"
        lines.append(f"registry {registered['model']} version {registered['version']}, {holds}: {registered['reason']}")
    lines += [f"{name:<8} {where}" for name, where in summary["locations"].items()]
    return "\n".join(lines)


def metric_rows(summary: Json) -> list[Json]:
    """The metrics as the rows of a table: both models, their difference, and whether it is clear.

    Args:
        summary: Of the finished run.
    """
    rows = []
    for name, entry in summary["metrics"]["metrics"].items():
        row: Json = {"metric": name, "better": entry["better"]}
        for which in ("tuned", "base", "difference"):
            figures = entry.get(which)
            row[which] = None if figures is None else round(figures["value"], 6)
            row[f"{which} interval"] = None if figures is None else f"[{figures['low']:.4f}, {figures['high']:.4f}]"
        rows.append(row | {"tuned is": verdict(entry)})
    return rows


def report_markdown(summary: Json) -> str:
    """The report in short, for pages that show Markdown: metrics, kinds of failure, and where the whole is.

    Args:
        summary: Of the finished run.
    """
    metrics = summary["metrics"]
    lines = [f"{metrics['num_rows']} rows of the {metrics['split']} split.", ""]
    lines += ["| metric | tuned | base | tuned − base | tuned is |", "|---|---|---|---|---|"]
    for row in metric_rows(summary):
        cells = [f"{row[which]} {row[f'{which} interval'] or ''}".strip() for which in ("tuned", "base", "difference")]
        cells = ["–" if cell == "None" else cell for cell in cells]
        lines.append(
            f"| {row['metric']} ({row['better']} is better) | {' | '.join(cells)} | {row['tuned is'] or '–'} |"
        )
    counts = {kind: count for kind, count in metrics.get("failures", {}).items() if any(count.values())}
    if counts:
        lines += ["", "| kind of failure | tuned | base |", "|---|---|---|"]
        lines += [f"| {kind} | {count['tuned']} | {_dash(count['base'])} |" for kind, count in counts.items()]
    lines += ["", *(f"- {name}: `{where}`" for name, where in summary["locations"].items())]
    return "\n".join(lines)


def _dash(value: object) -> object:
    return "–" if value is None else value


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
    where = linked(session, wanted)
    if session.config.export.destination is not None:
        where["copies"] = without_secrets(session.config.export.destination)
    if session.tracker is not None:
        where["runs"] = viewer(session.tracker.uri)
    return where


def linked(session: Session, artifacts: Mapping[str, ArtifactRef]) -> dict[str, str]:
    """Where people find artifacts: below ``latest/`` beside a local store, by digest in a remote one.

    Args:
        session: The run.
        artifacts: By the names they get there.
    """
    root = session.local_root
    where = {}
    for name, ref in artifacts.items():
        if root is None:
            where[name] = without_secrets(f"{session.config.runtime.store} artifact {ref.digest}")
            continue
        link = _link(root.parent / "latest" / name, session.local(ref))
        where[name] = str(link / "report.html" if ref.kind == "report" else link)
    return where


def _link(link: Path, target: Path) -> Path:
    """Points a short, stable name at the newest artifact; replaced in one step, so that it is never missing."""
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)
    return Path(os.path.relpath(link)) if link.is_relative_to(Path.cwd()) else link
