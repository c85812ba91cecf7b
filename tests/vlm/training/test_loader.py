"""Processes of a data loader, which a GPU's training has, when all processes of a job get a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from functools import partial

from torch.utils.data import DataLoader

from tests.support.processes import descendants
from vlm.training.trainer import _collate_step

NUM_STEPS = 30


def collate(rows: Sequence[int]) -> dict[str, int]:
    time.sleep(0.01)
    return {"row": rows[0], "pid": os.getpid()}


def test_a_signal_to_all_leaves_the_loader_at_work_and_its_end_ends_it() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    steps = [{"micro_batches": [[number]]} for number in range(NUM_STEPS)]
    loader = DataLoader(steps, num_workers=2, prefetch_factor=2, collate_fn=partial(_collate_step, collate))
    rows, pids = [], set()
    try:
        for number, step in enumerate(loader):
            (batch,) = step["micro_batches"]
            rows.append(batch["row"])
            pids.add(batch["pid"])
            if number == 5:
                # Not from this process, whose word the loader's take.
                everyone = [str(pid) for pid in [*descendants(os.getpid()), os.getpid()]]
                subprocess.run(["kill", "-TERM", *everyone], check=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]
    assert rows == list(range(NUM_STEPS))
    assert len(pids) == 2
    assert not pids & set(descendants(os.getpid()))


def test_a_worker_ends_when_its_parent_says_so() -> None:
    steps = [{"micro_batches": [[number]]} for number in range(NUM_STEPS)]
    loader = iter(DataLoader(steps, num_workers=1, collate_fn=partial(_collate_step, collate)))
    next(loader)
    (worker,) = loader._workers
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0
