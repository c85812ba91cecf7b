"""Has parts of a dataset prepared by other processes or hosts, through one of Prefect's task runners: each is a task run.

Nothing but descriptions goes through Prefect and Dask; rows go through files in a folder that all reach.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefect import State, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled
from prefect.task_runners import ProcessPoolTaskRunner

from tasks.session import Session
from vlm.config.data import PreparationConfig
from vlm.data.exchange import StoppedError
from vlm.data.parts import Part, PartResult
from vlm.data.parts import prepare_part as prepare
from vlm.errors import ResourceError
from vlm.processes.signals import blocked, leave_to_parent

_CONNECT_SECONDS = 30
# Clusters that grow with the work may have no worker yet.
_WORKERS_SECONDS = 600
# They look once a second whether somebody still waits for them, between two rows.
_STOP_SECONDS = 30.0


@task(name="prepare_part", task_run_name="prepare_part {part.number}", cache_policy=NO_CACHE, persist_result=False)
def prepare_part(part: Part) -> PartResult | State[Any]:
    """Prepares one part of the dataset, on whichever process or host it is sent to."""
    from vlm.processing import Processing

    try:
        return prepare(part, Processing.from_dir)
    except StoppedError as stopped:
        return Cancelled(message=str(stopped))


@dataclass
class Workers:
    """Those who prepare parts.

    Attributes:
        num_workers: Asked for how many parts are prepared at once.
    """

    _runner: Any
    num_workers: Callable[[], int]
    _explain: Callable[[Exception], Exception | None]

    def __post_init__(self) -> None:
        self._waiting: deque[Any] = deque()

    def run(self, parts: Iterator[Part]) -> Iterator[PartResult]:
        """Results in order; so many parts are under way that workers have no gap, and disks are not filled.

        Args:
            parts: Asked for when they are needed.
        """
        for part in parts:
            # It may start a process, whose first threads must not take a signal that is not for them.
            with blocked():
                self._waiting.append(self._runner.submit(prepare_part, {"part": part}))
            if len(self._waiting) >= 2 * self.num_workers() + 2:
                yield self._next()
        while self._waiting:
            yield self._next()

    def _next(self) -> PartResult:
        try:
            result: PartResult = self._waiting.popleft().result()
        except Exception as error:
            explained = self._explain(error)
            if explained is None:
                raise
            raise explained from error
        return result

    def wait(self) -> None:
        """Waits for parts under way, once they are told to stop."""
        for future in self._waiting:
            with suppress(Exception):
                future.wait(_STOP_SECONDS)
        self._waiting.clear()


@contextmanager
def workers_for(distributed: PreparationConfig) -> Iterator[Workers]:
    """Workers as configured, which are gone, or free again, when the block ends.

    Args:
        distributed: The settings.

    Raises:
        ResourceError: The Dask scheduler is not there, or has no workers.
    """
    with _server_for_all(distributed):
        if distributed.dask_scheduler is not None:
            with _dask_workers(distributed.dask_scheduler) as workers:
                yield workers
            return
        count = distributed.num_local_processes
        with ProcessPoolTaskRunner(max_workers=count, initializer=_settle_in) as runner:
            yield Workers(runner, lambda: count, lambda error: _lost_process(error, count))


def _lost_process(error: Exception, count: int) -> Exception | None:
    if not isinstance(error, BrokenProcessPool):
        return None
    return ResourceError(
        f"one of the {count} processes that prepare rows was killed, mostly because this machine ran out of memory; lower"
        " data.distributed.num_processes, or give it more, and run again"
    )


def _settle_in() -> None:
    """What a process of the pool does first: signals to all are for the one that started it, which it never outlives."""
    leave_to_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _dask_workers(address: str) -> Iterator[Workers]:
    try:
        from distributed.scheduler import KilledWorker
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise ResourceError(
            f"data.distributed.dask_scheduler {address!r} needs the package prefect-dask ({error}): pip install"
            " 'vision-finetune[dask]', here and where the workers run"
        ) from error

    def explain(error: Exception) -> Exception | None:
        if isinstance(error, KilledWorker):
            return ResourceError(
                f"a part was given to several workers of {address!r}, all of which ended over it ({error}); give them more memory, and"
                " see their logs"
            )
        if isinstance(error, ImportError) or "deserializ" in str(error):
            return ResourceError(
                f"the scheduler {address!r}, or a worker of it, cannot read what it is sent ({error}: {error.__cause__}); install the same version of this"
                " project and of its packages there"
            )
        return None

    with DaskTaskRunner(address=address, client_kwargs={"timeout": _CONNECT_SECONDS}) as runner:
        try:
            client = runner.client
        except (OSError, ValueError) as error:
            raise ResourceError(
                f"data.distributed.dask_scheduler {address!r} cannot be reached ({error}); start one there with 'dask scheduler', and"
                " workers with 'dask worker'"
            ) from error
        try:
            client.wait_for_workers(1, timeout=_WORKERS_SECONDS)
        except TimeoutError as error:
            raise ResourceError(
                f"the Dask scheduler {address!r} has had no worker for {_WORKERS_SECONDS} s; start some: dask worker {address}"
            ) from error
        workers = Workers(runner, lambda: sum(client.nthreads().values()), explain)
        try:
            yield workers
        finally:
            workers.wait()


@contextmanager
def _server_for_all(distributed: PreparationConfig) -> Iterator[None]:
    """Has workers tell the same Prefect server as this process, instead of each starting one of its own."""
    if PREFECT_API_URL.value() is not None:
        yield
        return
    host = urlsplit(distributed.dask_scheduler or "").hostname or "localhost"
    if not (host in ("localhost", "::1") or host.startswith("127.")):
        raise ResourceError(
            f"workers of {distributed.dask_scheduler!r} cannot reach this process's own Prefect server; start one with 'prefect server"
            " start --host 0.0.0.0', and set PREFECT_API_URL to its address"
        )
    with get_client(sync_client=True) as client:
        url = str(client.api_url)
    with temporary_settings({PREFECT_API_URL: url}):
        yield


@contextmanager
def exchange_folder(session: Session, stage: Path) -> Iterator[tuple[str, Path]]:
    """A folder through which those who prepare rows exchange files: its address, and a local folder for files on the way.

    It is in the store, which hosts have to reach anyway. Both are removed when the block ends.

    Args:
        session: The run.
        stage: Of the unit that is built.
    """
    scratch = stage.absolute() / "scratch"
    scratch.mkdir()
    is_local = session.store.backend.is_local or session.config.data.distributed.dask_scheduler is None
    # The store's garbage collection knows tmp/, and removes what a killed run leaves there.
    remote = f"{session.config.runtime.store.rstrip('/')}/tmp/{uuid.uuid4().hex}"
    address = str(stage.absolute() / "exchange") if is_local else remote
    try:
        yield address, scratch
    finally:
        from vlm.data.exchange import remove_exchange

        remove_exchange(address)
        shutil.rmtree(scratch, ignore_errors=True)
