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
    base = answers(session, checkpoint, dataset) if session.config.generation.evaluate_base_model else None
    tuned = answers(session, checkpoint, dataset, adapter)
    return finish(session, "inference_mode", Predicted(tuned, base))


def answers(
    session: Session, checkpoint: ArtifactRef, dataset: ArtifactRef, adapter: ArtifactRef | None = None
) -> ArtifactRef:
    """The predictions of a checkpoint, with an adapter or bare.

    Args:
        session: The run.
        checkpoint: The model.
        dataset: Whose rows it answers.
        adapter: Put on the model; None takes the model as it is.
    """

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
    if adapter is None:
        return session.run("inference_mode.base", inputs, build).outputs["predictions"]
    return session.run("inference_mode.tuned", inputs | {"adapter": adapter}, build).outputs["predictions"]
