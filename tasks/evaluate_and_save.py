"""Step 7: metrics, the report page, and one export per asked-for type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from artifacts.refs import ArtifactRef
from tasks.delivery import deliver
from tasks.graph import Json
from tasks.inference_mode import Predicted
from tasks.registry import Candidate, register, source_of
from tasks.session import Session, package_versions
from tasks.step import finish, step
from tasks.train import Trained
from vlm.config.evaluation import ExportType


class Saved(NamedTuple):
    """What the run leaves for people and for other programs."""

    metrics: ArtifactRef
    report: ArtifactRef
    exports: dict[ExportType, ArtifactRef]
    registered: Json | None = None
    """What the model registry made of it, where one is used."""


@step
def evaluate_and_save(
    session: Session,
    checkpoint: ArtifactRef,
    dataset: ArtifactRef,
    plan: ArtifactRef,
    trained: Trained,
    predicted: Predicted,
) -> Saved:
    """Scores the answers, writes the report and exports the model by type."""
    metrics = save_metrics(session, predicted)
    refs = {"metrics": metrics, "training": trained.training, "dataset": dataset, "plan": plan}
    report = save_report(session, f"{Path(session.config.model.name).name}: fine-tuning report", refs)
    exports = {}
    for kind in session.config.export.types:
        exports[kind] = _export(session, kind, checkpoint, trained.adapter)
        if session.config.export.destination is not None:
            deliver(session, exports[kind], f"{session.config.export.destination.rstrip('/')}/{kind}")
    registered = None
    if session.config.tracking.registered_model is not None:
        made = {"adapter": trained.adapter} | {f"export.{kind}": ref for kind, ref in exports.items()}
        source = source_of(session, exports, trained.adapter)
        registered = register(session, Candidate(source, predicted.tuned, metrics, made))
    return finish(session, "evaluate_and_save", Saved(metrics, report, exports, registered))


def save_metrics(session: Session, predicted: Predicted) -> ArtifactRef:
    """Scores answers against the expected ones.

    Args:
        session: The run.
        predicted: The answers of one or both models.
    """

    def build(stage: Path, inputs: Mapping[str, Path]) -> Json:
        from vlm.evaluation.evaluate import evaluate_predictions

        return evaluate_predictions(
            inputs["tuned"], inputs.get("base"), session.config.evaluation, stage / "metrics"
        ).to_json()

    inputs = {"tuned": predicted.tuned}
    if predicted.base is not None:
        inputs["base"] = predicted.base
    return session.run("evaluate_and_save.metrics", inputs, build).outputs["metrics"]


def save_report(session: Session, title: str, refs: Mapping[str, ArtifactRef]) -> ArtifactRef:
    """Writes the report page.

    Args:
        session: The run.
        title: The page's heading.
        refs: What it shows: `metrics`, and `training`, `dataset` and `plan` where there are any.
    """

    def build(stage: Path, inputs: Mapping[str, Path]) -> Json:
        from vlm.data.prepared import PreparedDataset
        from vlm.evaluation.report import render_report

        config = session.config
        rows, ledger, plan = None, {}, None
        if "dataset" in inputs:
            rows = PreparedDataset(inputs["dataset"], config.generation.split)
            summary = json.loads((inputs["dataset"] / "summary.json").read_text(encoding="utf-8"))
            ledger = {
                f"{action}: {reason}": count
                for action, reasons in summary["ledger"].items()
                for reason, count in reasons.items()
            }
        if "plan" in inputs:
            plan = json.loads((inputs["plan"] / "plan.json").read_text(encoding="utf-8"))
        page = render_report(
            title=title,
            metrics_dir=inputs["metrics"],
            output_dir=stage / "report",
            rows=rows,
            training_dir=inputs.get("training"),
            plan=plan,
            ledger=ledger,
            configuration=session.unit("evaluate_and_save.report").settings(session.resolved),
            provenance=package_versions() | {name: ref.digest for name, ref in refs.items()},
        )
        return {"size_bytes": page.stat().st_size}

    return session.run("evaluate_and_save.report", refs, build).outputs["report"]


def _export(session: Session, kind: ExportType, checkpoint: ArtifactRef, adapter: ArtifactRef) -> ArtifactRef:
    def build(stage: Path, inputs: Mapping[str, Path]) -> Json:
        from vlm.export import export

        return export(
            kind,
            inputs["checkpoint"],
            inputs["adapter"],
            stage / "export",
            max_shard_size_mb=session.config.export.max_shard_size_mb,
            device=session.resolved.device,
        ).to_json()

    inputs = {"checkpoint": checkpoint, "adapter": adapter}
    return session.run(f"evaluate_and_save.export.{kind}", inputs, build).outputs["export"]
