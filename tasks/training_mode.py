"""Step 4: plan the training and refuse, before any GPU time is spent, what would not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from artifacts.refs import ArtifactRef
from tasks.graph import Json
from tasks.session import Session
from tasks.step import finish, step
from vlm.training.device import num_local_processes


@step
def training_mode(session: Session, checkpoint: ArtifactRef, adapter: ArtifactRef, dataset: ArtifactRef) -> ArtifactRef:
    """Plans batches, steps and precision, and estimates memory."""

    def build(stage: Path, inputs: Mapping[str, Path]) -> Json:
        from vlm.training.plan import make_plan

        run = session.resolved
        several = run.config.training.distributed
        num_spread = 1
        if several.strategy == "fsdp2":
            name = "training.distributed.num_processes"
            num_spread = num_local_processes(several.num_processes, run.device, name) * several.num_machines
        return make_plan(
            inputs["dataset"],
            inputs["checkpoint"],
            inputs["adapter"],
            run.config.training,
            stage / "plan",
            device=run.device,
            dtype=run.precision,
            num_spread=num_spread,
        ).to_json()

    inputs = {"checkpoint": checkpoint, "adapter": adapter, "dataset": dataset}
    result = session.run("training_mode", inputs, build)
    return finish(session, "training_mode", result.outputs["plan"])
