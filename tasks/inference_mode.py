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
from vlm.training.device import num_local_processes


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
    inputs = {"checkpoint": checkpoint, "dataset": dataset}
    name = "inference_mode.base"
    if adapter is not None:
        inputs["adapter"], name = adapter, "inference_mode.tuned"

    def build(stage: Path, folders: Mapping[str, Path]) -> Json:
        generation, device = session.config.generation, session.resolved.device
        num_processes = num_local_processes(generation.num_processes, device, "generation.num_processes")
        if num_processes > 1:
            from vlm.generate_on_processes import generate_on_processes
            from vlm.loading.holder import release

            release()
            return generate_on_processes(
                folders["checkpoint"],
                folders["dataset"],
                generation,
                stage / "predictions",
                work_dir=session.store.resumable(session.key(name, inputs)),
                device=device,
                num_processes=num_processes,
                adapter_dir=folders.get("adapter"),
                digest=checkpoint.digest,
            ).to_json()
        from vlm.generate import generate_predictions

        return generate_predictions(
            held_model(session, checkpoint),
            folders["dataset"],
            generation,
            stage / "predictions",
            adapter_dir=folders.get("adapter"),
        ).to_json()

    return session.run(name, inputs, build).outputs["predictions"]
