"""The templates of work pools, against what Prefect's workers, Docker's client and Kubernetes' schemas take."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from pathlib import Path
from typing import Any

import kubernetes_validate
import prefect
import pytest
import yaml
from docker.types import HostConfig
from prefect.client.schemas.objects import FlowRun
from prefect.utilities.importtools import import_object
from prefect.utilities.templating import apply_values
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

PROJECT = Path(__file__).resolve().parents[2]
# Whose schemas; those of 1.25 and newer took the same when this was written.
KUBERNETES = "1.37"
# What Prefect knows of its workers without their packages.
KNOWN = Path(prefect.__file__).parent / "server/api/collections_data/views/aggregate-worker-metadata.json"
# Of newer workers than those that the list describes (prefect-docker 0.7.4, prefect-kubernetes 0.8.0).
NEWER = {"docker": {"container_create_kwargs"}, "kubernetes": {"annotations"}}


def template(kind: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((PROJECT / f"deploy/{kind}-pool.json").read_text())
    return loaded


def filled(kind: str, **values: Any) -> dict[str, Any]:
    """The job that a run with these job variables gets."""
    own = template(kind)
    defaults = {name: value["default"] for name, value in own["variables"]["properties"].items() if "default" in value}
    job: dict[str, Any] = apply_values(own["job_configuration"], defaults | values)
    return job


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_every_variable_has_a_place_and_every_place_a_variable(kind: str) -> None:
    known = json.loads(KNOWN.read_text())[f"prefect-{kind}"][kind]["default_base_job_configuration"]
    own = template(kind)
    assert set(own["job_configuration"]) <= set(known["job_configuration"]) | NEWER[kind]
    places = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(own["job_configuration"])))
    assert places == set(own["variables"]["properties"])
    assert all("description" in variable for variable in own["variables"]["properties"].values())
    # Prefect's own variables keep their type.
    for name, variable in known["variables"]["properties"].items():
        if name in own["variables"]["properties"]:
            assert own["variables"]["properties"][name]["type"] == variable["type"], name


def test_docker_gets_the_gpus_of_the_run() -> None:
    asked = [{"device_ids": ["2", "3"], "capabilities": [["gpu"]]}]
    for values, ids in (({}, [["0"]]), ({"device_requests": asked}, [["2", "3"]]), ({"device_requests": []}, [])):
        host = HostConfig(version="1.44", **filled("docker", **values)["container_create_kwargs"])
        assert [request["DeviceIDs"] for request in host["DeviceRequests"]] == ids
        assert all(request["Capabilities"] == [["gpu"]] for request in host["DeviceRequests"])
        assert host["ShmSize"] == 8 * 2**30
    assert filled("docker")["volumes"] == ["vision-finetune:/data"]


def test_kubernetes_gets_the_gpus_of_the_run() -> None:
    job = filled("kubernetes", gpus=2, node_selector={"gpu": "h200"})
    pod = job["job_manifest"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert pod["nodeSelector"] == {"gpu": "h200"}
    # What the worker insists on.
    assert container["name"] == "prefect-job"
    assert (pod["restartPolicy"], pod["completions"], pod["parallelism"]) == ("Never", 1, 1)
    # Mounts are of volumes that are there, and the one of data is where the image works.
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert "WORKDIR /data" in (PROJECT / "deploy/Dockerfile").read_text()
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/data", "/dev/shm"}
    # A waiting run is no crashed one.
    assert job["pod_watch_timeout_seconds"] >= 3600


def prepared(**values: Any) -> dict[str, Any]:
    """The job that Prefect's worker would send to Kubernetes for a run with these job variables."""
    offline: Any = object()  # for a client that looks up blocks, of which there are none
    given = KubernetesWorkerJobConfiguration.from_template_and_values(template("kubernetes"), values, client=offline)
    configuration = asyncio.run(given)
    configuration.prepare_for_flow_run(FlowRun(flow_id=uuid.uuid4(), name="a-run"))
    pod = configuration.job_manifest["spec"]["template"]["spec"]
    # The worker insists on them here, where Kubernetes does not know them and leaves them out.
    assert (pod.pop("completions"), pod.pop("parallelism")) == (1, 1)
    return configuration.job_manifest


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"gpus": 0, "tolerations": [], "service_account_name": "trainer", "env": {"A": "b"}, "labels": {"team": "x"}},
        {"gpus": 8, "hostname": "machine-0", "subdomain": "training", "node_selector": {"gpu": "h200"}},
    ],
)
def test_the_job_that_the_worker_makes_is_one_for_kubernetes(values: dict[str, Any]) -> None:
    job = prepared(**values)
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    pod = job["spec"]["template"]
    assert pod["spec"].get("hostname") == values.get("hostname")
    assert pod["spec"]["containers"][0]["args"] == ["prefect", "flow-run", "execute"]
    # What the service of a training on several machines looks for; Prefect's own labels come on top.
    assert pod["metadata"]["labels"]["app"] == "vision-finetune"


def test_a_field_that_kubernetes_does_not_know_is_seen() -> None:
    job = prepared()
    job["spec"]["template"]["spec"]["nodeSelectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="'nodeSelectors' was unexpected"):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_runs_in_containers_work_on_the_volume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # it is changed
    [step] = yaml.safe_load((PROJECT / "deploy/containers.yaml").read_text())["pull"]
    [(name, arguments)] = step.items()
    # Without a step that ends in a folder, Prefect works in a temporary one.
    assert arguments == {"directory": "/data"}
    (tmp_path / "data").mkdir()
    assert import_object(name)(directory=str(tmp_path / "data")) == {"directory": str(tmp_path / "data")}
    assert Path.cwd() == tmp_path / "data"


def test_containers_have_the_same_deployments() -> None:
    own, of_containers = (
        yaml.safe_load((PROJECT / name).read_text()) for name in ("prefect.yaml", "deploy/containers.yaml")
    )
    assert own["deployments"] == of_containers["deployments"]
    # None: the folder of `prefect deploy`, as a step that Prefect adds.
    assert own["pull"] is None
