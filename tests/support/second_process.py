"""The second of two processes that train together; the first one is that of the tests. Trains each job whose file it is told."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from vlm.training.distributed.job import Job


def main() -> None:
    import torch

    torch.set_num_threads(1)
    from vlm.loading.checkpoint import load_checkpoint
    from vlm.training.distributed.ranks import AgreedStop, join
    from vlm.training.interrupt import TrainingInterrupted
    from vlm.training.train import train_adapter

    ranks = join("cpu", float(sys.argv[1]))
    for line in sys.stdin:
        job = Job.read(Path(line.strip()))
        ranks.stop = AgreedStop()
        with suppress(TrainingInterrupted):
            train_adapter(
                load_checkpoint(job.checkpoint_dir, device="cpu"),
                job.adapter_dir,
                job.dataset_dir,
                job.plan_dir,
                job.training,
                job.output_dir,
                work_dir=job.work_dir,
                generation=job.generation,
                evaluation=job.evaluation,
                ranks=ranks,
            )


if __name__ == "__main__":
    main()
