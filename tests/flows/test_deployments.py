"""A real server, all deployments, and one run through a process worker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import settings_on

PROJECT = Path(__file__).resolve().parents[2]
PREFECT = [sys.executable, "-m", "prefect"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def stop(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server of the test's own; yields the environment in which `prefect` talks to it."""
    home = tmp_path_factory.mktemp("prefect")
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = dict(os.environ) | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    with open(home / "server.log", "wb") as log:
        command = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(
            command, cwd=home, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        for _ in range(600):
            assert process.poll() is None, (home / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        else:
            pytest.fail((home / "server.log").read_text())
        yield environment
    finally:
        stop(process)


def run(command: list[str], environment: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_all_deploy_and_one_runs_to_completed(server: dict[str, str], tmp_path: Path) -> None:
    run([*PREFECT, "work-pool", "create", "--type", "process", "vision-finetune"], server, tmp_path)
    run([*PREFECT, "--no-prompt", "deploy", "--all"], server, PROJECT)
    url = server["PREFECT_API_URL"]
    deployments = {entry["name"]: entry for entry in post(f"{url}/deployments/filter", {})}
    assert set(deployments) == {"on-demand", "nightly", "evaluate"}
    assert deployments["nightly"]["schedules"][0]["schedule"]["cron"] == "30 2 * * *"
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
    body = {"parameters": {"config": config}, "state": {"type": "SCHEDULED"}}
    flow_run = post(f"{url}/deployments/{deployments['on-demand']['id']}/create_flow_run", body)
    # Away from the project's folder: the module entrypoint must not depend on where the worker starts.
    run([*PREFECT, "worker", "start", "--pool", "vision-finetune", "--type", "process", "--run-once"], server, tmp_path)
    with urllib.request.urlopen(f"{url}/flow_runs/{flow_run['id']}", timeout=30) as answer:
        state = json.load(answer)["state"]
    assert state["type"] == "COMPLETED", state
    tasks = post(f"{url}/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run["id"]]}}})
    assert len(tasks) == 7
    assert {task["state"]["type"] for task in tasks} == {"COMPLETED"}
    artifacts = post(f"{url}/artifacts/filter", {})
    assert {"metrics", "summary", "report"} <= {artifact["key"] for artifact in artifacts}
