"""Starts processes with torch's elastic launcher, the one behind ``torchrun``.

``python -m vlm.processes.launcher LAUNCH.json``. It is a process of its own: torch's launcher takes over signal handlers, and the
process that runs the flow shall not.
"""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from vlm.processes import signals
from vlm.processes.plan import Failure, Launch, write_failures

# From asking processes to end, when one of them failed, to ending them.
_SHUTDOWN_SECONDS = 8
# How long machines wait for each other at the start: they may come up far apart.
_MEETING_SECONDS = 1800


def main() -> int:
    """Starts them and waits.

    Returns:
        0 where all ended well.
    """
    # torch's launcher would end its processes within seconds, where they are to finish their step. They ignore signals to all,
    # too, until they handle them themselves.
    signals.ignore()
    launch = Launch.read(Path(sys.argv[1]))
    alone = launch.num_machines == 1
    # Older versions of torch wait for half a minute, and cannot be told.
    settings: dict[str, Any] = {}
    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        settings["shutdown_timeout"] = _SHUTDOWN_SECONDS
    config = LaunchConfig(
        min_nodes=launch.num_machines,
        max_nodes=launch.num_machines,
        nproc_per_node=launch.num_processes,
        rdzv_configs={"rank": launch.machine_rank, "timeout": _MEETING_SECONDS},
        max_restarts=0,
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint=launch.main_address or "localhost:0",
        run_id=uuid.uuid4().hex if alone else "training",
        local_addr="localhost" if alone else None,
        signals_to_handle=signals.END_SIGNAL.name,
        logs_specs=DefaultLogsSpecs(log_dir=str(launch.events_dir / "logs"), redirects=Std.ALL),
        **settings,
    )
    try:
        elastic_launch(config, sys.executable)("-m", launch.worker, str(launch.job))
    except ChildFailedError as error:
        ordered = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        write_failures([Failure(rank, own.local_rank, own.exitcode) for rank, own in ordered], launch.events_dir)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
