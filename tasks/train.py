"""Step 5: train the adapter, resuming where an interrupted run stopped."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from artifacts.refs import ArtifactRef
from tasks.graph import Json
from tasks.models import held_model
from tasks.session import Session
from tasks.step import finish, step
from vlm.training.device import num_local_processes


class Trained(NamedTuple):
    """What training leaves behind."""

    adapter: ArtifactRef
    training: ArtifactRef


@step
def train(
    session: Session, checkpoint: ArtifactRef, adapter: ArtifactRef, dataset: ArtifactRef, plan: ArtifactRef
) -> Trained:
    """Trains the adapter with TRL's SFTTrainer as planned, on as many GPUs and machines as configured."""
    inputs = {"checkpoint": checkpoint, "adapter": adapter, "dataset": dataset, "plan": plan}

    distributed = session.config.training.distributed

    def build(stage: Path, folders: Mapping[str, Path]) -> Json:
        from tasks.tracking import training_callbacks
        from vlm.training.disk import check_disk
        from vlm.training.interrupt import TrainingInterrupted

        work_dir = session.store.resumable(session.key("train", inputs))
        num_processes = num_local_processes(
            distributed.num_processes, session.resolved.device, "training.distributed.num_processes"
        )
        if distributed.machine_rank == 0:
            check_disk(folders["adapter"], folders["plan"], session.config.training, work_dir, stage)
        single = num_processes == distributed.num_machines == 1
        try:
            if distributed.machine_rank > 0:
                _on_processes(session, checkpoint, folders, num_processes, work_dir, stage, [])
                return {}
            with training_callbacks(session, work_dir) as callbacks:
                if single:
                    return _here(session, checkpoint, folders, work_dir, stage, callbacks)
                return _on_processes(session, checkpoint, folders, num_processes, work_dir, stage, callbacks)
        except TrainingInterrupted as interrupted:
            # The training stands in a checkpoint; now whoever handles the signal for this process shall act on it:
            # under a worker Prefect does, and marks the run as cancelled.
            signal.raise_signal(interrupted.signum)
            raise

    run = session.run if distributed.machine_rank == 0 else session.take_part
    result = run("train", inputs, build)
    return finish(session, "train", Trained(result.outputs["adapter"], result.outputs["training"]))


def _here(
    session: Session,
    checkpoint: ArtifactRef,
    folders: Mapping[str, Path],
    work_dir: Path,
    stage: Path,
    callbacks: Sequence[Any],
) -> Json:
    """Trains in this process."""
    from vlm.training.train import train_adapter

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


def _on_processes(
    session: Session,
    checkpoint: ArtifactRef,
    folders: Mapping[str, Path],
    num_processes: int,
    work_dir: Path,
    stage: Path,
    callbacks: Sequence[Any],
) -> Json:
    """Trains in processes of their own, which get the GPUs to themselves."""
    from vlm.loading.holder import release
    from vlm.training.distributed.job import Job
    from vlm.training.distributed.launch import train_on_processes

    release()
    training = session.config.training
    job = Job(
        checkpoint_dir=folders["checkpoint"],
        digest=checkpoint.digest,
        adapter_dir=folders["adapter"],
        dataset_dir=folders["dataset"],
        plan_dir=folders["plan"],
        output_dir=stage,
        work_dir=work_dir,
        events_dir=work_dir / f"machine-{training.distributed.machine_rank}",
        device=session.resolved.device,
        num_processes=num_processes,
        training=training,
        generation=session.config.generation,
        evaluation=session.config.evaluation,
    )
    summary = train_on_processes(job, callbacks)
    return {} if summary is None else summary.to_json()
