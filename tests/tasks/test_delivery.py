from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from artifacts.refs import ArtifactRef
from artifacts.store import Store
from tasks.delivery import MARKER, UNDER_WAY, deliver
from vlm.errors import ExportError


class Artifacts:
    """A store and what `deliver` needs of a session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store.open(str(folder / "store"))
        self.session: Any = SimpleNamespace(store=self.store, local=self.store.materialize)

    def publish(self, **files: str) -> ArtifactRef:
        source = self.folder / "source"
        source.mkdir(exist_ok=True)
        for name, text in files.items():
            (source / name).write_text(text)
        return self.store.publish(source, kind="export", metadata={}, provenance={}, consume=True)


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path)


@pytest.fixture(params=["file", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield str(tmp_path / "out" / "lora")
        return
    yield "memory://out/lora"
    fsspec.filesystem("memory").store.clear()


def content(address: str) -> dict[str, str]:
    filesystem, root = fsspec.core.url_to_fs(address)
    return {path.removeprefix(root).lstrip("/"): filesystem.cat_file(path).decode() for path in filesystem.find(root)}


def test_a_second_export_takes_the_place_of_the_first(artifacts: Artifacts, address: str) -> None:
    first = artifacts.publish(config="1", weights_1="old", weights_2="old")
    deliver(artifacts.session, first, address)
    assert json.loads(content(address)[MARKER])["digest"] == first.digest
    filesystem, root = fsspec.core.url_to_fs(address)
    filesystem.pipe_file(f"{root}/notes.txt", b"a person's own")
    second = artifacts.publish(config="2", weights_1="new")
    deliver(artifacts.session, second, address)
    found = content(address)
    assert json.loads(found.pop(MARKER))["digest"] == second.digest
    # The first one's second file would be loaded with the second one's, and files of like size are replaced.
    assert found == {"config": "2", "weights_1": "new", "notes.txt": "a person's own"}


def test_a_copy_that_was_cut_off_goes_on(artifacts: Artifacts, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver(artifacts.session, artifacts.publish(a="0", b="0", c="0"), address)
    ref = artifacts.publish(a="1", b="1", c="1")
    filesystem, _ = fsspec.core.url_to_fs(address)
    copied: list[str] = []
    right = type(filesystem).put_file

    def put_file(self: Any, source: str, target: str, **options: Any) -> None:
        copied.append(Path(source).name)
        right(self, source, target, **options)
        if len(copied) == 2:
            filesystem.pipe_file(target, b"")  # cut off in the middle of a file
            raise OSError("connection lost")

    monkeypatch.setattr(type(filesystem), "put_file", put_file)
    with pytest.raises(ExportError, match="connection lost"):
        deliver(artifacts.session, ref, address)
    assert MARKER not in content(address)
    deliver(artifacts.session, ref, address)
    assert copied == ["a", "b", "b", "c"]
    found = content(address)
    assert json.loads(found.pop(MARKER))["digest"] == ref.digest
    assert {name: text for name, text in found.items() if not name.endswith(".part")} == dict.fromkeys("abc", "1")
    assert UNDER_WAY not in found
    deliver(artifacts.session, ref, address)
    assert len(copied) == 4


class Hub:
    """The client, with a repository in memory."""

    files: dict[str, bytes] = {}
    commits: list[str] = []
    folder: Path

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert (repo_id, private, exist_ok) == ("user/model", True, True)

    def list_repo_files(self, repo_id: str) -> list[str]:
        return list(self.files)

    def hf_hub_download(self, repo_id: str, name: str) -> str:
        path = self.folder / "downloaded"
        path.write_bytes(self.files[name])
        return str(path)

    def create_commit(self, repo_id: str, operations: list[Any], *, commit_message: str) -> None:
        self.commits.append(commit_message)
        for operation in operations:
            if type(operation).__name__ == "CommitOperationDelete":
                del self.files[operation.path_in_repo]
            else:
                source = operation.path_or_fileobj
                self.files[operation.path_in_repo] = source if isinstance(source, bytes) else Path(source).read_bytes()


def test_the_hub_gets_one_commit_per_export(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.files, Hub.commits, Hub.folder = {"README.md": b"their own"}, [], tmp_path
    first = artifacts.publish(config="1", weights_1="old", weights_2="old")
    for _ in range(2):
        deliver(artifacts.session, first, "hf://user/model/lora")
    assert len(Hub.commits) == 1
    second = artifacts.publish(config="2", weights_1="new")
    deliver(artifacts.session, second, "hf://user/model/lora")
    assert len(Hub.commits) == 2
    assert json.loads(Hub.files.pop("lora/artifact.json"))["digest"] == second.digest
    assert Hub.files == {"README.md": b"their own", "lora/config": b"2", "lora/weights_1": b"new"}


def test_what_the_hub_refuses_is_one_error(artifacts: Artifacts) -> None:
    ref = artifacts.publish(config="1")
    for address in ("hf://datasets/user/name/lora", "hf://model"):
        with pytest.raises(ExportError, match="is no repository of models; give hf://user/name"):
            deliver(artifacts.session, ref, address)
    with pytest.raises(ExportError, match="the Hub cannot be reached for 'user/model'"):
        deliver(artifacts.session, ref, "hf://user/model/lora")  # offline, as all tests are
