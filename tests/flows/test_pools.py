"""The templates of work pools, against what Prefect's workers and Docker's client take."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import prefect
import pytest
import yaml
from docker.types import HostConfig
from prefect.utilities.templating import apply_values

PROJECT = Path(__file__).resolve().parents[2]
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
    extra = filled("docker", gpu_ids=["2", "3"])["container_create_kwargs"]
    host = HostConfig(version="1.44", **extra)
    (request,) = host["DeviceRequests"]
    assert (request["DeviceIDs"], request["Capabilities"]) == (["2", "3"], [["gpu"]])
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


def test_containers_have_the_same_deployments() -> None:
    own, of_containers = (
        yaml.safe_load((PROJECT / name).read_text()) for name in ("prefect.yaml", "deploy/containers.yaml")
    )
    assert own["deployments"] == of_containers["deployments"]
    # None: the folder of `prefect deploy`. An empty list: wherever the container works.
    assert (own["pull"], of_containers["pull"]) == (None, [])
