"""Step 3: from any source to validated, decoded and measured conversations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from artifacts.refs import ArtifactRef
from tasks.graph import Json
from tasks.session import Session
from tasks.step import finish, step


@step
def prepare_dataset(session: Session, checkpoint: ArtifactRef) -> ArtifactRef:
    """Validates rows, decodes and resizes images once, and measures exact lengths."""

    def build(stage: Path, inputs: Mapping[str, Path]) -> Json:
        from vlm.data.prepare import prepare_dataset as prepare
        from vlm.processing import Processing

        processing = Processing.from_dir(inputs["processor"] / "processor")
        config = session.config
        return prepare(
            config.data,
            processing,
            stage / "dataset",
            num_workers=config.runtime.num_workers,
            required_splits=session.needed_splits,
        ).to_json()

    result = session.run("prepare_dataset", {"processor": checkpoint}, build)
    return finish(session, "prepare_dataset", result.outputs["dataset"])
