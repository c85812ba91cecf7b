"""Starts the processes of this machine with torch's elastic launcher, the one behind ``torchrun``.

``python -m vlm.training.distributed.launcher JOB.json``. It is a process of its own: torch's launcher takes over signal handlers,
and the process that runs the flow shall not.
"""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from vlm.training.distributed.job import Failure, Job, write_failures

_WORKER = "vlm.training.distributed.worker"
# How long machines wait for each other at the start: they may come up far apart.
_MEETING_SECONDS = 1800


def main() -> int:
    """Starts them and waits.

    Returns:
        0 where all ended well.
    """
    path = Path(sys.argv[1])
    job = Job.read(path)
    several = job.training.distributed
    alone = several.num_machines == 1
    config = LaunchConfig(
        min_nodes=several.num_machines,
        max_nodes=several.num_machines,
        nproc_per_node=job.num_processes,
        rdzv_configs={"rank": several.machine_rank, "timeout": _MEETING_SECONDS},
        max_restarts=0,
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint=several.main_address or "localhost:0",
        run_id=uuid.uuid4().hex if alone else "training",
        local_addr="localhost" if alone else None,
        logs_specs=DefaultLogsSpecs(log_dir=str(job.events_dir / "logs"), redirects=Std.ALL),
    )
    try:
        elastic_launch(config, sys.executable)("-m", _WORKER, str(path))
    except ChildFailedError as error:
        ordered = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        write_failures([Failure(rank, own.local_rank, own.exitcode) for rank, own in ordered], job.events_dir)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
