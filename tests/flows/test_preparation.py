"""Step 3 on several processes and hosts: the same dataset, seen in Prefect, and nothing left behind by what goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest

from tests.artifacts.conftest import s3, s3_address  # noqa: F401  (fixtures)
from tests.support.preparation import (
    damaged_source,
    dask_hosts,
    mixed_sources,
    only_the_dataset,
    say_and_sleep,
    slow_source,
    wait_for,
)
from vlm.config import RunConfig
from vlm.config.data import DataConfig, PreparationConfig
from vlm.errors import DataError, ResourceError

pytestmark = [
    pytest.mark.usefixtures("prefect_server"),
    # Dask's and Prefect's own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def processor_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vlm.builtin import make_builtin_checkpoint

    folder = tmp_path_factory.mktemp("processor")
    make_builtin_checkpoint(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.data.parts._FIRST_ROWS", 20)
    monkeypatch.setattr("vlm.data.parts._MOST_ROWS", 20)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """No process of a test outlives it."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    after = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    # Python's own, one for the whole process.
    assert not [process for process in after if "resource_tracker" not in " ".join(process.cmdline())]


def prepared(
    data: DataConfig,
    processor_dir: Path,
    folder: Path,
    *,
    while_it_runs: Callable[[], None],
    exchange: str | None = None,
) -> Path:
    """Prepares as the task does; gives the dataset."""
    from tasks.parts import workers_for
    from vlm.data.parts import prepare_in_parts

    for name in ("dataset", "scratch"):
        (folder / name).mkdir(parents=True)
    with ThreadPoolExecutor(1) as helper:
        meanwhile = helper.submit(while_it_runs)
        try:
            with workers_for(data.distributed) as workers:
                prepare_in_parts(
                    data,
                    processor_dir,
                    folder / "dataset",
                    workers.run,
                    exchange=exchange or str(folder / "exchange"),
                    scratch=folder / "scratch",
                )
        finally:
            meanwhile.result()
    return folder / "dataset"


def here(data: DataConfig, processor_dir: Path, folder: Path) -> Path:
    from vlm.data.prepare import prepare_dataset
    from vlm.processing import Processing

    folder.mkdir()
    prepare_dataset(data, Processing.from_dir(processor_dir), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_make_the_same_artifact_in_task_runs_of_their_own(
    small_settings: dict[str, Any], tmp_path: Path
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import TaskRunFilter

    settings = small_settings | {"data": mixed_sources(tmp_path / "data")}
    expected = only_the_dataset(RunConfig.model_validate(settings))
    settings["data"]["distributed"] = {"num_processes": 2}
    config = RunConfig.model_validate(settings)
    assert only_the_dataset(config, rerun_from="prepare_dataset") == expected
    from artifacts.store import Store

    store = Store.open(config.runtime.store)
    assert list((store.work_dir / "tmp").iterdir()) == []
    ledger = [json.loads(line) for line in store.read_text(expected, "ledger.jsonl").splitlines()]
    assert {entry["reason"] for entry in ledger} >= {
        "duplicate_id",
        "leak",
        "bad_json",
        "empty_answer",
        "image_not_found",
    }
    of_parts = TaskRunFilter.model_validate({"name": {"like_": "prepare_part"}})

    def finished() -> list[str]:
        with get_client(sync_client=True) as client:
            runs = client.read_task_runs(task_run_filter=of_parts)
        return [run.name for run in runs if run.state_name == "Completed"]

    num_parts = 8 + 5 + 5 + 5
    assert wait_for(lambda: sorted(finished()) if len(finished()) >= num_parts else None) == sorted(
        f"prepare_part {number}" for number in range(num_parts)
    )


def test_workers_on_other_hosts_share_files_in_a_bucket_and_one_of_them_may_die(
    tmp_path: Path,
    processor_dir: Path,
    s3: str,  # noqa: F811
) -> None:
    data = mixed_sources(tmp_path / "data")
    slow = slow_source(tmp_path / "slow", 20)
    fs = fsspec.filesystem("s3")
    fs.put(str(tmp_path / "data" / "rows.parquet"), f"{s3}/hosts/rows.parquet")
    data["sources"] = [{"path": f"{s3}/hosts/rows.parquet"}, str(slow), *data["sources"]]
    expected = here(DataConfig.model_validate(data), processor_dir, tmp_path / "expected")
    with dask_hosts(tmp_path / "hosts") as (address, workers):
        data["distributed"] = {"dask_scheduler": address}

        def kill_one() -> None:
            other = fsspec.filesystem("s3", use_listings_cache=False)
            wait_for(lambda: len(other.find(f"{s3}/hosts/exchange")) > 2)
            os.kill(workers[0].pid, signal.SIGKILL)

        found = prepared(
            DataConfig.model_validate(data),
            processor_dir,
            tmp_path / "parts",
            exchange=f"{s3}/hosts/exchange",
            while_it_runs=kill_one,
        )
        assert workers[0].wait(20) == -signal.SIGKILL
        assert contents(found) == contents(expected)
        fs.invalidate_cache()
        # The one who died may have left a part that nobody asked for.
        assert [name for name in fs.find(f"{s3}/hosts/exchange") if "processor" in name] == []
        # The one who is left tells what is wrong with a file.
        data["sources"] = [damaged_source(tmp_path / "damaged.parquet")]
        with pytest.raises(DataError, match=r"damaged.parquet' cannot be read as parquet"):
            prepared(DataConfig.model_validate(data), processor_dir, tmp_path / "damaged", while_it_runs=lambda: None)
        # Nothing of a worker's is beside it, where another host would not see it.
        assert [path.name for path in (tmp_path / "hosts" / "host-1").iterdir()] == ["log"]


def slow_data(path: Path, num_processes: int) -> DataConfig:
    sources = [{"path": str(path), "split": "train"}]
    return DataConfig.model_validate({"sources": sources, "distributed": {"num_processes": num_processes}})


def once_parts_are_written(tmp_path: Path, act: Callable[[], None]) -> Callable[[], None]:
    def wait_and_act() -> None:
        wait_for(lambda: any((tmp_path / "parts" / "exchange").glob("part-*")))
        act()

    return wait_and_act


def test_a_killed_process_is_one_error_and_an_interrupt_ends_all(tmp_path: Path, processor_dir: Path) -> None:
    path = slow_source(tmp_path / "slow", 400)

    def kill_one() -> None:
        found = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
        # Sent to all processes of a job, as Slurm does, these are for the flow's own.
        for name in ("INT", "TERM"):
            subprocess.run(["kill", f"-{name}", *(str(child.pid) for child in found)], check=True)
        assert psutil.wait_procs(found, timeout=0.5)[0] == []
        found[0].kill()

    with pytest.raises(ResourceError, match="one of the 2 processes that prepare rows was killed"):
        prepared(
            slow_data(path, 2),
            processor_dir,
            tmp_path / "parts",
            while_it_runs=once_parts_are_written(tmp_path, kill_one),
        )
    (tmp_path / "parts").rename(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        prepared(
            slow_data(path, 1),
            processor_dir,
            tmp_path / "parts",
            while_it_runs=once_parts_are_written(tmp_path, lambda: os.kill(os.getpid(), signal.SIGINT)),
        )
    for folder in ("killed", "parts"):
        assert not (tmp_path / folder / "dataset" / "summary.json").exists()
        assert not (tmp_path / folder / "exchange" / "processor.zip").exists()


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    from tasks.parts import workers_for

    there = tmp_path / "there"
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException), workers_for(PreparationConfig()) as workers:
            workers._runner.submit(say_and_sleep, {"path": there}).wait()
        os._exit(1)
    try:
        wait_for(there.exists)
        workers = psutil.Process(pid).children(recursive=True)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert workers
    assert psutil.wait_procs(workers, timeout=20)[1] == []


def test_a_scheduler_that_is_not_there_and_a_server_that_hosts_do_not_reach_are_one_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks import parts

    monkeypatch.setattr(parts, "_CONNECT_SECONDS", 0.5)
    distributed = PreparationConfig(dask_scheduler="tcp://127.0.0.1:9")
    with (
        pytest.raises(
            ResourceError, match=r"'tcp://127.0.0.1:9' cannot be reached .* start one there with 'dask sched"
        ),
        parts.workers_for(distributed),
    ):
        pass
    distributed = PreparationConfig(dask_scheduler="tcp://node0:8786")
    with (
        temporary_settings(restore_defaults=[PREFECT_API_URL]),
        pytest.raises(
            ResourceError, match=r"'tcp://node0:8786' cannot reach this process's own Prefect server.*set PREF"
        ),
        parts.workers_for(distributed),
    ):
        pass
