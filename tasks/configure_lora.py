"""Step 2: choose the modules that learn and make the initial adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from artifacts.refs import ArtifactRef
from tasks.graph import Json
from tasks.models import held_model
from tasks.session import Session
from tasks.step import finish, step


@step
def configure_lora(session: Session, checkpoint: ArtifactRef) -> ArtifactRef:
    """Chooses the modules that learn and makes the seeded initial adapter."""

    def build(stage: Path, inputs: Mapping[str, Path]) -> Json:
        from vlm.lora.build import build_adapter

        loaded = held_model(session, checkpoint)
        return build_adapter(loaded, session.config.lora, stage / "adapter").to_json()

    result = session.run("configure_lora", {"checkpoint": checkpoint}, build)
    return finish(session, "configure_lora", result.outputs["adapter"])
