"""Drawing ahead of the training, in processes of their own.

Packs come back through pipes as plain arrays: machines that lend little shared memory would fail late with anything
that takes it. Loads torch and transformers.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import torch

from vlm.config.pretrain import CurriculumConfig, PretrainConfig
from vlm.pretrain.packs import Arrays, PackMaker
from vlm.processes.signals import leave_to_parent

_AHEAD_PER_WORKER = 2
_makers: list[PackMaker] = []


def default_workers() -> int:
    """One process per core, but for two: one launches work on the GPU, and one feeds it."""
    return max(1, len(os.sched_getaffinity(0)) - 2)


class Feed:
    """Packs in order, drawn by several processes at once.

    Args:
        processor_dir: A checkpoint folder with the model's config, tokenizer and processor.
        config: Settings.
        first: Number of the first pack.
        done_at: Gives the share of the training at which a pack will be trained on, from its number.
    """

    def __init__(
        self, processor_dir: Path, config: PretrainConfig, first: int, done_at: Callable[[int], float]
    ) -> None:
        self.num_workers = default_workers() if config.num_workers is None else config.num_workers
        self._done_at = done_at
        self._next = first
        self._waiting: deque[Future[Arrays]] = deque()
        start = (processor_dir, config.curriculum, config.positions_per_step, config.seed)
        self._pool: ProcessPoolExecutor | None = None
        self._maker: PackMaker | None = None
        if self.num_workers:
            # Fresh processes: a copy of one with threads and a GPU in it may hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.num_workers, context, initializer=_start, initargs=start)
        else:
            self._maker = PackMaker(*start)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __next__(self) -> Arrays:
        """The next pack."""
        if self._maker is not None:
            self._next += 1
            return self._maker(self._next - 1, self._done_at(self._next - 1))
        self._order()
        pack = self._waiting.popleft().result()
        self._order()
        return pack

    def wait(self) -> None:
        """Waits until the first pack is drawn, and so the processes have started."""
        if self._pool is not None:
            self._order()
            self._waiting[0].result()

    @property
    def is_late(self) -> bool:
        """Whether whoever asks for the next pack has to wait for it."""
        return not (self._waiting and self._waiting[0].done())

    def _order(self) -> None:
        assert self._pool is not None, "only processes are ordered from"
        while len(self._waiting) < _AHEAD_PER_WORKER * self.num_workers:
            self._waiting.append(self._pool.submit(_draw, self._next, self._done_at(self._next)))
            self._next += 1


def _start(processor_dir: Path, curriculum: CurriculumConfig, positions: int, seed: int) -> None:
    leave_to_parent()
    torch.set_num_threads(1)  # there is a process for every core
    _makers.append(PackMaker(processor_dir, curriculum, positions, seed))


def _draw(number: int, done: float) -> Arrays:
    return _makers[0](number, done)
