"""One process of a training: ``python -m vlm.training.distributed.worker JOB.json``, started by torch's launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from vlm.training.distributed.events import EventWriter, events_file
from vlm.training.distributed.job import Job


def main() -> None:
    """Trains its part."""
    job = Job.read(Path(sys.argv[1]))
    events = EventWriter(events_file(job.events_dir, int(os.environ["LOCAL_RANK"])))
    logging.getLogger("vlm").addHandler(events)
    try:
        _train(job, events)
    except BaseException as error:
        from vlm.training.interrupt import TrainingInterrupted

        if isinstance(error, TrainingInterrupted):
            events.tell({"interrupted": error.step, "signal": error.signum})
            return
        events.tell({"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()})
        sys.stdout.flush()
        sys.stderr.flush()
        # Others may be gone, and an orderly end would wait for them.
        os._exit(1)


def _train(job: Job, events: EventWriter) -> None:
    import torch
    import torch.distributed as dist

    from vlm.training.distributed.ranks import join

    if job.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // job.num_processes))
    ranks = join(job.device, job.training.distributed.timeout_seconds)
    threading.Thread(target=_listen, args=(ranks.stop,), daemon=True).start()

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

    train_adapter(
        load_checkpoint(
            job.checkpoint_dir,
            device=job.device,
            digest=job.digest,
            # One GPU may not hold it.
            on_host=job.training.distributed.strategy == "fsdp2",
        ),
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
    # None leaves while another still writes: the launcher would take a broken connection for a failure.
    ranks.wait()
    dist.destroy_process_group()


def _listen(stop: Any) -> None:
    """Does what the process that started the training says: a byte asks for a stop, the end of the stream means that it is gone."""
    while True:
        said = os.read(0, 1)
        if not said:
            os._exit(1)
        stop.ask(signal.SIGTERM)


if __name__ == "__main__":
    main()
