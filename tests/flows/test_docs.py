"""What the operations guide says can be done as it says.

Blocks of commands are of two kinds, by the second word behind their fence: `run` is run here as it stands, with a toy model
as `receipts.yaml`; `parse` (what needs a cluster, a bucket, a browser or minutes) is read by the program that it calls.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prefect.cli import _app as prefect_cli

from flows import cli as finetune
from flows import compare, evaluate_cli, notify, promote
from tests.flows.conftest import settings_on
from tests.flows.test_pools import KUBERNETES
from vlm.config import RunConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

PROJECT = Path(__file__).resolve().parents[2]
DOCS = PROJECT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# In the order in which people read them: the store fills, the registry gets versions.
ORDER = ("install.md", "data.md", "evaluating.md", "storage.md", "scheduling.md", "scaling.md", "upgrading.md")
_BLOCK = re.compile(r"^```(\w+) ?([\w ]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of the fenced blocks in a language."""
    for found, kind, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if found == language:
            yield kind, text


def commands(page: Path, kind: str) -> list[list[str]]:
    """The words of each command of the blocks of a kind, loops written out."""
    lines = [line for found, text in blocks(page, "bash") if found == kind for line in text.splitlines()]
    parts: list[str] = []
    for line in lines:
        loop = re.fullmatch(r"for (\w+) in ([^;]+); do (.*); done", line)
        if loop:
            parts += [loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()]
        else:
            parts += line.split(" && ")
    return [shlex.split(part, comments=True) for part in parts if part.strip()]


def without_environment(words: list[str]) -> list[str]:
    """A command without the variables set before it, and with the plain name of its program."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        other = (page.parent / target).resolve() if target else page
        assert other.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for picture in page.parent.glob("images/*"):
        assert picture.stat().st_size <= 200_000


def test_every_block_says_what_is_done_with_it_and_every_picture_is_shown() -> None:
    everything = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    kinds = {(language, kind) for language, kind, _ in _BLOCK.findall(everything)}
    assert kinds <= {
        ("bash", "run"),
        ("bash", "parse"),
        ("sbatch", ""),
        ("yaml", "config"),
        ("yaml", "deployment"),
        ("yaml", "kubernetes"),
    }
    shown = re.findall(r"images/([\w.]+)", "".join(page.read_text(encoding="utf-8") for page in PAGES))
    assert {path.name for path in (DOCS / "images").iterdir()} == set(shown)
    assert {path.name for path in PAGES if any(kind == "run" for kind, _ in blocks(path, "bash"))} <= set(ORDER)


def test_settings_are_settings() -> None:
    for page in PAGES:
        for kind, text in blocks(page, "yaml"):
            if kind == "kubernetes":
                for manifest in yaml.safe_load_all(text):
                    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
                continue
            found = yaml.safe_load(text)
            if kind == "deployment":
                found = found["parameters"]["config"]
            RunConfig.model_validate(found)


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning")  # mlflow's, when it is imported
def test_scripts_of_clusters_call_the_flow_with_settings_that_it_has() -> None:
    page = DOCS / "scaling.md"
    [(_, script)] = blocks(page, "sbatch")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    [manifests] = [yaml.safe_load_all(text) for kind, text in blocks(page, "yaml") if kind == "kubernetes"]
    service, job = manifests
    [container] = job["spec"]["template"]["spec"]["containers"]
    # The address of the first machine is one that the service gives its pod.
    metadata, pod = job["spec"]["template"]["metadata"], job["spec"]["template"]["spec"]
    assert f"{job['metadata']['name']}-0.{service['metadata']['name']}:" in container["args"][0]
    assert (pod["subdomain"], metadata["labels"]) == (service["metadata"]["name"], service["spec"]["selector"])
    for text in (script.replace("\\\n", " "), *container["args"]):
        words = set(re.findall(r"--([a-z_]+(?:\.[a-z_]+)+)", text))
        assert "training.distributed.machine_rank" in words
        for word in words:
            section: Any = RunConfig
            for name in word.split("."):
                section = section.model_fields[name].annotation


def test_messages_are_those_of_the_code() -> None:
    pieces = []
    for folder in ("vlm", "tasks", "artifacts", "flows"):
        for path in (PROJECT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    texts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    pieces.append("".join(map(str, texts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    pieces.append(node.value)
    pieces = [piece for piece in pieces if " " in piece]
    # Prefect's, Docker's and the operating system's own.
    foreign = {
        "Validation failed for field 'config.data.sources[0]'",
        'could not select device driver "" with capabilities: [[gpu]]',
        "address already in use",
    }
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [text for text in re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) if text not in foreign]
    assert len(messages) > 25
    for message in messages:
        parts = [re.escape(part) for part in message.split("…")]
        pattern = re.compile(".*?".join(parts))
        assert any(pattern.search(piece) for piece in pieces), message


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning")  # mlflow's, when it is imported
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "receipts.yaml").write_text("{}")
    for words in commands(page, "parse"):
        understand(without_environment(words))


def understand(words: list[str]) -> None:
    """Has the program's own parser read a command."""
    match words:
        case ["python3", "-m", "venv", folder]:
            assert folder == ".venv"
        case ["pip", "install", *rest]:
            from pip._internal.commands import create_command

            options, targets = create_command("install").parse_args([word for word in rest if word != "-e"])
            assert all((PROJECT / path).is_file() for path in options.constraints)
            extras = extras_of_the_package()
            for target in targets:
                name, _, asked = target.partition("[")
                assert name in (".", "vision-finetune")
                assert {extra for extra in asked.rstrip("]").split(",") if extra} <= extras
        case ["mlflow", *rest]:
            from click import Group
            from mlflow.cli import cli

            command: Any = cli
            name: str | None = "mlflow"
            while isinstance(command, Group):
                context = command.make_context(name, list(rest), resilient_parsing=True)
                name, command, rest = command.resolve_command(context, rest)
            command.make_context(name, rest)
        case ["dask", *rest]:
            from importlib.metadata import entry_points

            [found] = entry_points(group="dask_cli", name=rest[0])
            found.load().make_context("dask", rest[1:])
        case ["prefect", *rest]:
            rest = [word for word in rest if word != "--no-prompt"]  # of all commands; read before theirs
            prefect_cli._app.parse_args(rest, exit_on_error=False, print_error=False)
        case ["python", "-m", "flows.evaluate", *rest]:
            evaluate_cli.parse(rest)
        case ["python", "-m", "flows.vision_finetune", *rest]:
            finetune.parse(rest)
        case ["docker", "build", "-f", file, "-t", name, "."]:
            assert name == "vision-finetune"
            copied = re.findall(r"^COPY (.*) \S+$", (PROJECT / file).read_text(), re.MULTILINE)
            assert all((PROJECT / path).exists() for paths in copied for path in paths.split())
        case _:
            raise AssertionError(f"no test knows {words}")


def extras_of_the_package() -> set[str]:
    import tomllib

    with (PROJECT / "pyproject.toml").open("rb") as handle:
        return set(tomllib.load(handle)["project"]["optional-dependencies"])


@pytest.fixture(scope="module")
def workplace(
    tmp_path_factory: pytest.TempPathFactory, small_settings: dict[str, Any], first_run: dict[str, Any]
) -> Iterator[Path]:
    """A folder with a toy configuration where the pages have theirs, and the store after the session's first run."""
    folder = tmp_path_factory.mktemp("workplace")
    settings = settings_on(Path("runs/store")) | {"tracking": {"registered_model": "receipts"}}
    store = Path(small_settings["runtime"]["store"])
    shutil.copytree(store, folder / "runs" / "store", symlinks=True)
    shutil.copy(store.parent / "mlflow.db", folder / "runs")
    (folder / "receipts.yaml").write_text(yaml.safe_dump(settings))
    empty_server()
    yield folder
    empty_server()


def empty_server() -> None:
    """Removes pools, deployments and what they have scheduled from the session's server, which other tests use, too."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    scheduled = FlowRunFilter.model_validate({"state": {"type": {"any_": ["SCHEDULED"]}}})
    with get_client(sync_client=True) as client:
        for flow_run in client.read_flow_runs(flow_run_filter=scheduled):
            client.delete_flow_run(flow_run.id)
        for deployment in client.read_deployments():
            client.delete_deployment(deployment.id)
        for pool in client.read_work_pools():
            client.delete_work_pool(pool.name)


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# Prefect's command line leaves its connections to the end of the process; a process per command would take seconds each.
_PREFECT_COMMANDS = """
import json, sys
from prefect.cli import _app
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["prefect", *arguments]
    try:
        _app.app()
    except SystemExit as end:
        if end.code:
            raise SystemExit(f"{arguments} ended with {end.code}")
"""


def run(words: list[str]) -> None:
    """Runs a command of this project in this process."""
    from artifacts.__main__ import main as artifacts_main

    mains: dict[str, Callable[[list[str]], int]] = {
        "flows.vision_finetune": finetune.main,
        "flows.evaluate": evaluate_cli.main,
        "flows.compare": compare.main,
        "flows.promote": promote.main,
        "flows.notify": notify.main,
        "artifacts": artifacts_main,
    }
    assert words[:2] == ["python", "-m"], words
    arguments = words[3:]
    if words[2] == "flows.vision_finetune" and "--config" not in arguments:
        arguments += ["--config", "receipts.yaml"]  # minutes otherwise
    assert mains[words[2]](arguments) == 0, words


@pytest.mark.parametrize("page", ORDER)
def test_commands_run(page: str, workplace: Path) -> None:
    from prefect.settings import PREFECT_API_URL

    found = [without_environment(words) for words in commands(DOCS / page, "run")]
    with working_in(workplace):
        for words in found:
            if words[0] != "prefect":
                run(words)
    prefect = [words[1:] for words in found if words[0] == "prefect"]
    if prefect:
        environment = dict(os.environ) | {"PREFECT_API_URL": str(PREFECT_API_URL.value())}
        command = [sys.executable, "-c", _PREFECT_COMMANDS, json.dumps(prefect)]
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
