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
        processor_dir = inputs["processor"] / "processor"
        distributed = session.config.data.distributed
        if distributed.dask_scheduler is None and distributed.num_local_processes == 1:
            return _here(session, processor_dir, stage)
        return _in_parts(session, processor_dir, stage)

    result = session.run("prepare_dataset", {"processor": checkpoint}, build)
    return finish(session, "prepare_dataset", result.outputs["dataset"])


def _here(session: Session, processor_dir: Path, stage: Path) -> Json:
    """Prepares in threads of this process."""
    from vlm.data.prepare import prepare_dataset as prepare
    from vlm.processing import Processing

    return prepare(
        session.config.data,
        Processing.from_dir(processor_dir),
        stage / "dataset",
        num_workers=session.config.runtime.num_workers,
        required_splits=session.needed_splits,
    ).to_json()


def _in_parts(session: Session, processor_dir: Path, stage: Path) -> Json:
    """Has other processes or hosts prepare."""
    from tasks.parts import exchange_folder, workers_for
    from vlm.data.parts import prepare_in_parts

    with exchange_folder(session, stage) as (address, scratch), workers_for(session.config.data.distributed) as workers:
        return prepare_in_parts(
            session.config.data,
            processor_dir,
            stage / "dataset",
            workers.run,
            exchange=address,
            scratch=scratch,
            num_threads=session.config.runtime.num_workers or 0,
            max_pieces=4 * workers.num_workers(),
            required_splits=session.needed_splits,
        ).to_json()
