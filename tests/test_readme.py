"""What the README says can be done as it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from flows.cli import parse
from vlm.config import RunConfig

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [part.strip() for line in lines for part in line.split("#")[0].split("&&")]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (PROJECT / target).exists()


def test_the_tree_exists() -> None:
    tree = blocks("text")[0]
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        folder = name if not line.startswith(" ") else folder
        path = PROJECT / name if name == folder else PROJECT / folder / name
        assert path.exists(), path


def test_the_yaml_is_a_configuration() -> None:
    config = RunConfig.model_validate(yaml.safe_load(blocks("yaml")[0]))
    assert config.export.types == ("lora", "merged_16bit")
    assert config.data.sources[1].split == "test"


@pytest.mark.parametrize("command", [text for text in commands() if "flows.vision_finetune" in text])
def test_commands_of_the_pipeline_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "receipts.yaml").write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    parse(shlex.split(command)[3:])


@pytest.mark.parametrize("command", [text for text in commands() if "flows.evaluate" in text])
def test_commands_of_the_evaluation_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.evaluate_cli import parse as parse_evaluation

    (tmp_path / "receipts.yaml").write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    config, _ = parse_evaluation(shlex.split(command, comments=True)[3:])
    assert config.subject.path == "runs/latest/adapter"


@pytest.mark.parametrize("command", [text for text in commands() if re.search(r"flows\.(compare|promote)", text)])
def test_commands_on_results_reach_the_store(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows import compare, promote

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "store").mkdir(parents=True)
    words = shlex.split(command)
    main = {"flows.compare": compare.main, "flows.promote": promote.main}[words[2]]
    # The options are understood; what they ask for is not there.
    assert main(words[3:]) == 2
    error = capsys.readouterr().err
    assert any(text in error for text in ("no results yet", "digest starts with", "is not there"))


@pytest.mark.parametrize("command", [text for text in commands() if text.startswith("python -m artifacts")])
def test_commands_of_the_store_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from artifacts.__main__ import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "store").mkdir(parents=True)
    assert main(shlex.split(command)[3:]) == 0


def test_ci_installs_and_tests_as_the_readme_says() -> None:
    script = (PROJECT / ".ci" / "run").read_text()
    wanted = [text for text in commands() if "[test]" in text or "pytest" in text]
    assert len(wanted) == 2
    for command in wanted:
        assert command in script
