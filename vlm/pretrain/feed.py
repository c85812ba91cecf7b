"""Drawing ahead of the training, in processes of their own.

Packs come back through pipes as plain arrays: machines that lend little shared memory would fail late with anything
that takes it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.config.pretrain import CurriculumConfig, PretrainConfig

if TYPE_CHECKING:
    from vlm.pretrain.packs import PackMaker

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

    def __init__(self, processor_dir: Path, config: PretrainConfig, first: int, done_at: Callable[[int], float]) -> None:
        self.num_workers = config.num_workers or default_workers()
        self._done_at = done_at
        self._next = first
        self._waiting: deque[Future[dict[str, Any]]] = deque()
        # Fresh processes: a copy of one with threads and a GPU in it may hang.
        self._pool = ProcessPoolExecutor(
            self.num_workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(processor_dir, config.curriculum, config.positions_per_step, config.seed),
        )

    def __enter__(self) -> Feed:
        self._order()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __next__(self) -> dict[str, Any]:
        """The next pack."""
        self._order()
        pack = self._waiting.popleft().result()
        self._order()
        return pack

    def wait(self) -> None:
        """Waits until the first pack is drawn, and so the processes have started."""
        self._order()
        self._waiting[0].result()

    @property
    def num_ready(self) -> int:
        """Packs that are drawn and wait; zero means that the training waits for them."""
        return sum(future.done() for future in self._waiting)

    def _order(self) -> None:
        while len(self._waiting) < _AHEAD_PER_WORKER * self.num_workers:
            self._waiting.append(self._pool.submit(_draw, self._next, self._done_at(self._next)))
            self._next += 1


def _start(processor_dir: Path, curriculum: CurriculumConfig, positions: int, seed: int) -> None:
    import torch

    from vlm.pretrain.packs import PackMaker

    torch.set_num_threads(1)  # there is a process for every core
    _makers.append(PackMaker(processor_dir, curriculum, positions, seed))


def _draw(number: int, done: float) -> dict[str, Any]:
    return _makers[0](number, done)
