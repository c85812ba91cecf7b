"""Step 1: load the model quantised and keep it, with its processor, as a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from artifacts.refs import ArtifactRef
from tasks.graph import Json
from tasks.session import Session
from tasks.step import finish, step


@step
def load_model(session: Session) -> ArtifactRef:
    """Loads the model by family, quantises it and saves it as a checkpoint."""

    def build(stage: Path, inputs: Mapping[str, Path]) -> Json:
        from vlm.loading.build import build_checkpoint

        run = session.resolved
        return build_checkpoint(session.model, stage / "checkpoint", device=run.device, dtype=run.precision).to_json()

    result = session.run("load_model", {}, build)
    checkpoint = result.outputs["checkpoint"]
    if "gguf" in session.config.export.types:
        from vlm.export.gguf.support import check_supported
        from vlm.families import family_by_name

        description = json.loads(session.store.read_text(checkpoint, "checkpoint.json"))
        check_supported(family_by_name(description["family"]))
    return finish(session, "load_model", checkpoint)
