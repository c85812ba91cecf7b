"""A real server, all deployments, and runs through a process worker: one that is cancelled, and one that goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import settings_on
from tests.flows.test_vision_finetune import logged_steps

PROJECT = Path(__file__).resolve().parents[2]
PREFECT = [sys.executable, "-m", "prefect"]


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture
def server(prefect_server: None, tmp_path: Path) -> dict[str, str]:
    """The environment in which `prefect` talks to the test's server, and keeps nothing at home."""
    from prefect.settings import PREFECT_API_URL

    return dict(os.environ) | {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_API_URL": str(PREFECT_API_URL.value())}


def run(command: list[str], environment: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def working(environment: dict[str, str], cwd: Path) -> Iterator[None]:
    """A worker that takes what is scheduled."""
    command = [*PREFECT, "worker", "start", "--pool", "vision-finetune", "--type", "process"]
    with (cwd / "worker.log").open("w") as log:
        worker = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield
        finally:
            worker.terminate()
            try:
                worker.wait(20)
            except subprocess.TimeoutExpired:
                # A worker that is asked while it sees to the end of a run may forget it, and would take runs of other
                # tests.
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()


def state_of(url: str, flow_run: dict[str, Any]) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/flow_runs/{flow_run['id']}", timeout=30) as answer:
        state: dict[str, Any] = json.load(answer)["state"]
        return state


def mlflow_states(database: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return [state for (state,) in connection.execute("select status from runs order by status")]


def wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.3)


@pytest.mark.slow
def test_all_deploy_and_one_is_cancelled_and_then_runs_to_completed(server: dict[str, str], tmp_path: Path) -> None:
    run([*PREFECT, "work-pool", "create", "--type", "process", "vision-finetune"], server, tmp_path)
    run([*PREFECT, "--no-prompt", "deploy", "--all"], server, PROJECT)
    url = server["PREFECT_API_URL"]
    deployments = {entry["name"]: entry for entry in post(f"{url}/deployments/filter", {})}
    assert set(deployments) == {"on-demand", "nightly", "evaluate"}
    assert deployments["nightly"]["schedules"][0]["schedule"]["cron"] == "30 2 * * *"
    assert deployments["nightly"]["parameters"]["config"]["tracking"]["registered_model"]
    assert deployments["nightly"]["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    assert deployments["on-demand"]["schedules"] == []
    assert deployments["evaluate"]["entrypoint"] == "flows.evaluate.evaluate"
    assert "What is scored" in json.dumps(deployments["evaluate"]["parameter_openapi_schema"])
    for name in ("on-demand", "nightly"):
        entry = deployments[name]
        assert entry["entrypoint"] == "flows.vision_finetune.vision_finetune"
        form = json.dumps(entry["parameter_openapi_schema"])
        assert "Which layers learn" in form
        assert "Peak learning rate" in form

    config = settings_on(tmp_path / "store")
    config["training"] |= {"max_steps": 40}
    body = {"parameters": {"config": config}, "state": {"type": "SCHEDULED"}}
    create = f"{url}/deployments/{deployments['on-demand']['id']}/create_flow_run"
    log = tmp_path / "mlflow.db"
    cancelled = post(create, body)
    # Away from the project's folder: the module entrypoint must not depend on where the worker starts.
    with working(server, tmp_path):
        wait_until(lambda: bool(logged_steps(log)), 300)
        post(f"{url}/flow_runs/{cancelled['id']}/set_state", {"state": {"type": "CANCELLING"}})
        # Prefect kills what has not ended half a minute after it was asked to.
        wait_until(lambda: state_of(url, cancelled)["type"] == "CANCELLED", 30)
        assert len(list((tmp_path / "store" / "work").glob("*/checkpoint-*"))) == 1
        assert len(logged_steps(log)) < 40
        assert mlflow_states(log) == ["KILLED", "KILLED"], "the flow's own, and its training's"
        flow_run = post(create, body)
        wait_until(lambda: state_of(url, flow_run)["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"), 300)
    steps = logged_steps(log)
    assert steps == sorted(set(steps)), "what the cancelled run had trained was not trained again"
    assert steps[-1] == 40
    assert mlflow_states(log) == ["FINISHED", "FINISHED", "KILLED"], "the training's went on"
    state = state_of(url, flow_run)
    assert state["type"] == "COMPLETED", state
    tasks = post(f"{url}/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run["id"]]}}})
    assert len(tasks) == 7
    assert {task["state"]["type"] for task in tasks} == {"COMPLETED"}
    artifacts = post(f"{url}/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run["id"]]}}})
    assert {"metrics", "summary", "report"} <= {artifact["key"] for artifact in artifacts}
