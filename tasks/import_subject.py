"""Brings an adapter, or answers that somebody else generated, into the store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from artifacts.refs import ArtifactRef
from tasks.graph import Json
from tasks.session import Session
from tasks.step import finish, step


@step
def import_subject(session: Session, dataset: ArtifactRef | None) -> ArtifactRef:
    """Copies what is to be scored into the store, checked against the dataset."""
    subject = session.subject
    assert subject is not None
    unit = f"import_subject.{subject.kind}"

    def build(stage: Path, inputs: Mapping[str, Path]) -> Json:
        if subject.kind == "adapter":
            from vlm.evaluation.subject import import_adapter

            return {"size_bytes": import_adapter(subject, stage / "adapter")}
        from vlm.evaluation.outside_predictions import import_predictions

        generation = session.config.generation
        return import_predictions(
            subject,
            stage / "predictions",
            dataset_dir=inputs.get("dataset"),
            split=generation.split,
            max_rows=generation.max_rows,
        ).to_json()

    inputs = {} if dataset is None or subject.kind == "adapter" else {"dataset": dataset}
    (ref,) = session.run(unit, inputs, build).outputs.values()
    return finish(session, "import_subject", ref)
