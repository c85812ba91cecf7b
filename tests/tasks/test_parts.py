"""Where those who prepare rows exchange files, and what is sent along with a task."""

from __future__ import annotations

import pickle
import uuid
from pathlib import Path

import fsspec
import pytest

from tasks.parts import exchange_folder
from tasks.session import Session
from vlm.config import RunConfig


@pytest.mark.parametrize(
    ("store", "distributed", "is_remote"),
    [
        ("memory://{}", {"dask_scheduler": "tcp://127.0.0.1:8786"}, True),
        ("memory://{}/deeper/", {"dask_scheduler": "tcp://127.0.0.1:8786"}, True),
        ("memory://{}", {"num_processes": 2}, False),
        ("{}", {"dask_scheduler": "tcp://127.0.0.1:8786"}, False),
    ],
)
def test_hosts_exchange_files_through_the_store(
    store: str, distributed: dict[str, object], is_remote: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = store.format(uuid.uuid4().hex)
    config = RunConfig.model_validate({"runtime": {"store": url}, "data": {"distributed": distributed}})
    session = Session.open(config)
    stage = Path("stage")
    stage.mkdir()
    with exchange_folder(session, stage) as (address, scratch):
        assert scratch.is_absolute()
        assert address.startswith(f"{url.rstrip('/')}/tmp/" if is_remote else str(tmp_path / "stage"))
        fs, path = fsspec.core.url_to_fs(address)
        fs.makedirs(path)
        fs.pipe_file(f"{path}/part", b"rows")
        (scratch / "part").write_bytes(b"rows")
    assert not fs.exists(path)
    assert list(stage.iterdir()) == []
    with exchange_folder(session, stage):
        pass  # nobody has made it


def test_the_run_stays_behind_where_a_task_is_sent() -> None:
    session = Session.open(RunConfig.model_validate({"runtime": {"store": f"memory://{uuid.uuid4().hex}"}}))
    assert type(pickle.loads(pickle.dumps(session))) is object  # noqa: S301
