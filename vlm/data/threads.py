"""Prepares rows in threads of this process, and gives them in the order in which they came."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from vlm.data.rows import Outcome
from vlm.data.sample import Job, SampleMaker

_CHUNK_WEIGHT_BYTES = 1 << 18
_CHUNK_MAX_ROWS = 32
# Rows whose pixels take less are faster in one thread than in several: most of their time is spent under Python's lock.
_SMALL_ROW_BYTES = 1 << 15


def in_order(jobs: Iterator[Job], maker: SampleMaker, num_workers: int) -> Iterator[tuple[Job, Outcome]]:
    """Outcomes in the order of the jobs; at most two chunks per worker, and two more, are in memory.

    Small rows that hold their images are prepared here as soon as those before them turned out to be small as well.

    Args:
        jobs: Rows to prepare.
        maker: Prepares them.
        num_workers: Threads; with 0, it all happens in the calling one.
    """
    if num_workers == 0:
        for chunk in _chunks(jobs):
            yield from zip(chunk, maker(chunk), strict=True)
        return
    small = False
    window: deque[tuple[list[Job], Future[list[Outcome]]]] = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="prepare")
    try:
        for chunk in _chunks(jobs):
            future: Future[list[Outcome]]
            if small and len(chunk) > 1:
                future = Future()
                future.set_result(maker(chunk))
            else:
                future = pool.submit(maker, chunk)
            window.append((chunk, future))
            if len(window) >= 2 * num_workers + 2:
                done, future = window.popleft()
                outcomes = future.result()
                small = _are_small(outcomes)
                yield from zip(done, outcomes, strict=True)
        while window:
            done, future = window.popleft()
            yield from zip(done, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _are_small(outcomes: list[Outcome]) -> bool:
    sizes = [sum(image.nbytes for image in outcome.sample.images) for outcome in outcomes if outcome.sample is not None]
    return bool(sizes) and sum(sizes) <= _SMALL_ROW_BYTES * len(sizes)


def _chunks(jobs: Iterator[Job]) -> Iterator[list[Job]]:
    """Small rows are handed over several at a time, large ones singly."""
    chunk: list[Job] = []
    weight = 0
    for job in jobs:
        chunk.append(job)
        weight += _weight(job)
        if weight >= _CHUNK_WEIGHT_BYTES or len(chunk) >= _CHUNK_MAX_ROWS:
            yield chunk
            chunk, weight = [], 0
    if chunk:
        yield chunk


def _weight(job: Job) -> int:
    """Rough bytes of a row's images; what is not in the row itself counts as a large one."""
    weight = 0
    for name in job.columns.images if isinstance(job.row, dict) else ():
        value = job.row.get(name)  # type: ignore[union-attr]
        data = value.get("bytes") if isinstance(value, dict) else value
        weight += len(data) if isinstance(data, bytes) else _CHUNK_WEIGHT_BYTES if value else 0
    return weight
