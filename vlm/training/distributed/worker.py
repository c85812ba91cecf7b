"""One process of a training: ``python -m vlm.training.distributed.worker JOB.json``, started by torch's launcher."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.processes.events import EventWriter
from vlm.processes.worker import fail, listen, run_worker, share_cores
from vlm.training.distributed.job import Job
from vlm.training.interrupt import TrainingInterrupted

if TYPE_CHECKING:
    from vlm.training.distributed.ranks import Ranks


def main() -> None:
    """Trains its part."""
    job = Job.read(Path(sys.argv[1]))
    run_worker(
        job.events_dir,
        job.device,
        partial(_train, job),
        interrupted=lambda error: isinstance(error, TrainingInterrupted),
    )


def _train(job: Job, events: EventWriter) -> None:
    import torch
    import torch.distributed as dist

    from vlm.training.distributed.ranks import join
    from vlm.training.distributed.watch import StepWatch

    if job.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(share_cores(job.num_processes))
    ranks = join(job.device, job.training.distributed.timeout_seconds)
    listen(lambda: ranks.stop.ask(signal.SIGTERM))
    if ranks.size > 1:
        ranks.watch = StepWatch(job.training.distributed.timeout_seconds, partial(give_up, ranks, events))

    from transformers import TrainerCallback

    from vlm.loading.checkpoint import load_checkpoint
    from vlm.training.train import train_adapter

    class Tell(TrainerCallback):
        """Tells of steps and figures."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.tell({"step": state.global_step})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if ranks.rank == 0:
                events.tell({"step": state.global_step, "log": logs or {}})

    # One GPU may not hold a model that is spread.
    on_host = job.training.distributed.strategy == "fsdp2"
    try:
        train_adapter(
            load_checkpoint(job.checkpoint_dir, device=job.device, digest=job.digest, on_host=on_host),
            job.adapter_dir,
            job.dataset_dir,
            job.plan_dir,
            job.training,
            job.output_dir,
            work_dir=job.work_dir,
            generation=job.generation,
            evaluation=job.evaluation,
            callbacks=[Tell()],
            ranks=ranks,
        )
    except TrainingInterrupted as error:
        events.tell({"interrupted": error.step, "signal": error.signum})
        raise
    # The launcher would take the broken connection of one that still writes for a failure.
    ranks.wait()
    dist.destroy_process_group()


def give_up(ranks: Ranks, events: EventWriter, seconds: float) -> None:
    """Says that a step hangs, and ends this process, whose own thread may wait for ever.

    Args:
        ranks: This process among the others.
        events: Where it tells.
        seconds: Since the step began.
    """
    waited = f"has been in one step for {seconds:.0f} s, far longer than in those before: another one hangs or is slow"
    fail(events, ranks.hung(waited))


if __name__ == "__main__":
    main()
