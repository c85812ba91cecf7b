"""Step 1: load the model quantised and keep it, with its processor, as a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from artifacts.refs import ArtifactRef
from tasks.graph import Json, export_unit
from tasks.plan import HIT, plan_run
from tasks.session import Session
from tasks.step import finish, step
from vlm.loading.source import local_folder


@step
def load_model(session: Session) -> ArtifactRef:
    """Loads the model by family, quantises it and saves it as a checkpoint."""

    def build(stage: Path, inputs: Mapping[str, Path]) -> Json:
        from vlm.loading.build import build_checkpoint

        run = session.resolved
        return build_checkpoint(session.model, stage / "checkpoint", device=run.device, dtype=run.precision).to_json()

    result = session.run("load_model", {}, build)
    checkpoint = result.outputs["checkpoint"]
    _check_exports(session, checkpoint)
    return finish(session, "load_model", checkpoint)


def _check_exports(session: Session, checkpoint: ArtifactRef) -> None:
    """Refuses GGUF files of a model that was no folder yet when the run's inputs were checked."""
    if "gguf" not in session.config.export.types or local_folder(session.model) is not None:
        return
    if any(entry.unit == export_unit("gguf") and entry.status == HIT for entry in plan_run(session)):
        return
    from vlm.export.gguf.support import check_model
    from vlm.families import family_by_name

    folder = session.local(checkpoint)
    description = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    check_model(family_by_name(description["family"]), folder / "model", folder / "processor")
