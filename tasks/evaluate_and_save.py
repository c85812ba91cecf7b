"""Step 7: metrics, the report page, and one verified export per asked-for type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from artifacts.refs import ArtifactRef
from tasks.delivery import deliver
from tasks.graph import Json, export_unit, is_verified_by_loading
from tasks.inference_mode import Predicted
from tasks.models import held_model
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
    metrics, figures = save_metrics(session, predicted)
    refs = {"metrics": metrics, "training": trained.training, "dataset": dataset, "plan": plan}
    report = save_report(session, f"{Path(session.config.model.name).name}: fine-tuning report", refs)
    exports = {}
    inputs = {"checkpoint": checkpoint, "adapter": trained.adapter, "figures": figures, "dataset": dataset}
    if is_verified_by_loading(session.config):
        inputs["reference"] = _reference(session, checkpoint, dataset, trained.adapter)
    for kind in session.config.export.types:
        exports[kind] = _export(session, kind, {name: inputs[name] for name in session.unit(export_unit(kind)).inputs})
        if session.config.export.destination is not None:
            deliver(session, exports[kind], f"{session.config.export.destination.rstrip('/')}/{kind}")
    registered = None
    if session.config.tracking.registered_model is not None:
        made = {"adapter": trained.adapter} | {f"export.{kind}": ref for kind, ref in exports.items()}
        source = source_of(session, exports, trained.adapter)
        registered = register(session, Candidate(source, predicted.tuned, metrics, made))
    return finish(session, "evaluate_and_save", Saved(metrics, report, exports, registered))


def save_metrics(session: Session, predicted: Predicted) -> tuple[ArtifactRef, ArtifactRef]:
    """Scores answers against the expected ones.

    Args:
        session: The run.
        predicted: The answers of one or both models.

    Returns:
        The metrics, and of these the figures that a model card shows.
    """

    def build(stage: Path, inputs: Mapping[str, Path]) -> Json:
        from vlm.evaluation.evaluate import evaluate_predictions

        return evaluate_predictions(
            inputs["tuned"], inputs.get("base"), session.config.evaluation, stage / "metrics", stage / "figures"
        ).to_json()

    inputs = {"tuned": predicted.tuned}
    if predicted.base is not None:
        inputs["base"] = predicted.base
    outputs = session.run("evaluate_and_save.metrics", inputs, build).outputs
    return outputs["metrics"], outputs["figures"]


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


def _reference(session: Session, checkpoint: ArtifactRef, dataset: ArtifactRef, adapter: ArtifactRef) -> ArtifactRef:
    def build(stage: Path, inputs: Mapping[str, Path]) -> Json:
        from vlm.export.reference import make_reference

        return make_reference(
            held_model(session, checkpoint),
            inputs["adapter"],
            inputs["dataset"],
            session.config.generation,
            session.config.export.verify_rows,
            stage / "reference",
        ).to_json()

    inputs = {"checkpoint": checkpoint, "dataset": dataset, "adapter": adapter}
    return session.run("evaluate_and_save.reference", inputs, build).outputs["reference"]


def _export(session: Session, kind: ExportType, refs: Mapping[str, ArtifactRef]) -> ArtifactRef:
    def build(stage: Path, inputs: Mapping[str, Path]) -> Json:
        from vlm.export import export, verify_export
        from vlm.export.gguf.modelfile import longest_conversation
        from vlm.export.gguf.support import note_unrun
        from vlm.loading.holder import release

        config, device = session.config, session.resolved.device
        summary = export(
            kind,
            inputs["checkpoint"],
            inputs["adapter"],
            stage / "export",
            max_shard_size_mb=config.export.max_shard_size_mb,
            gguf_type=config.export.gguf_type,
            longest_tokens=longest_conversation(inputs["dataset"]) if kind == "gguf" else None,
            device=device,
            figures=json.loads((inputs["figures"] / "figures.json").read_text(encoding="utf-8")),
        ).to_json()
        if "reference" not in inputs:
            if kind == "gguf" and config.export.verify:
                summary["verification"] = note_unrun(stage / "export")
            return summary
        release()  # the fresh process needs the memory
        verification = verify_export(
            kind,
            stage / "export",
            inputs["checkpoint"],
            inputs["dataset"],
            inputs["reference"],
            config.evaluation,
            device=device,
            gguf_type=config.export.gguf_type,
        )
        return summary | {"verification": verification.to_json()}

    return session.run(export_unit(kind), refs, build).outputs["export"]
