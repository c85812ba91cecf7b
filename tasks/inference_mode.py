"""Step 6: answer the held-out rows with the tuned model and, cached apart, with the base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from artifacts.refs import ArtifactRef
from tasks.graph import Json
from tasks.models import held_model
from tasks.session import Session
from tasks.step import finish, step


class Predicted(NamedTuple):
    """The answers of both models; ``base`` is None when the base model was not asked."""

    tuned: ArtifactRef
    base: ArtifactRef | None


@step
def inference_mode(session: Session, checkpoint: ArtifactRef, dataset: ArtifactRef, adapter: ArtifactRef) -> Predicted:
    """Answers the held-out rows in evaluation mode with the cache on."""

    def build(stage: Path, inputs: Mapping[str, Path]) -> Json:
        from vlm.generate import generate_predictions

        return generate_predictions(
            held_model(session, checkpoint),
            inputs["dataset"],
            session.config.generation,
            stage / "predictions",
            adapter_dir=inputs.get("adapter"),
        ).to_json()

    inputs = {"checkpoint": checkpoint, "dataset": dataset}
    base = None
    if session.config.generation.evaluate_base_model:
        base = session.run("inference_mode.base", inputs, build).outputs["predictions"]
    tuned = session.run("inference_mode.tuned", inputs | {"adapter": adapter}, build).outputs["predictions"]
    return finish(session, "inference_mode", Predicted(tuned, base))
