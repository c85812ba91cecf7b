"""Step 5: train the adapter, resuming where an interrupted run stopped."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from artifacts.refs import ArtifactRef
from tasks.graph import Json
from tasks.models import held_model
from tasks.session import Session
from tasks.step import finish, step


class Trained(NamedTuple):
    """What training leaves behind."""

    adapter: ArtifactRef
    training: ArtifactRef


@step
def train(
    session: Session, checkpoint: ArtifactRef, adapter: ArtifactRef, dataset: ArtifactRef, plan: ArtifactRef
) -> Trained:
    """Trains the adapter with TRL's SFTTrainer as planned."""
    inputs = {"checkpoint": checkpoint, "adapter": adapter, "dataset": dataset, "plan": plan}

    def build(stage: Path, folders: Mapping[str, Path]) -> Json:
        from tasks.tracking import training_callbacks
        from vlm.training.interrupt import TrainingInterrupted
        from vlm.training.train import train_adapter

        work_dir = session.store.resumable(session.key("train", inputs))
        try:
            with training_callbacks(session, work_dir) as callbacks:
                return train_adapter(
                    held_model(session, checkpoint),
                    folders["adapter"],
                    folders["dataset"],
                    folders["plan"],
                    session.config.training,
                    stage,
                    work_dir=work_dir,
                    generation=session.config.generation,
                    evaluation=session.config.evaluation,
                    callbacks=callbacks,
                ).to_json()
        except TrainingInterrupted as interrupted:
            # The training stands in a checkpoint; now whoever handles the signal for this process shall act on it:
            # under a worker Prefect does, and marks the run as cancelled.
            signal.raise_signal(interrupted.signum)
            raise

    result = session.run("train", inputs, build)
    return finish(session, "train", Trained(result.outputs["adapter"], result.outputs["training"]))
