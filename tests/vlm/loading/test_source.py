"""Where a name leads, and how the Hub's answers are put. No test uses the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from vlm.config.model import ModelConfig
from vlm.errors import ModelError
from vlm.loading import source
from vlm.loading.source import (
    check_weights,
    checkpoint_files,
    fetch_from_hub,
    hub_commit,
    is_builtin,
    local_folder,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_builtin_and_hub_names_have_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_folder(ModelConfig(name="builtin-random")) is None
    assert local_folder(ModelConfig(name="Qwen/Qwen2.5-VL-7B-Instruct")) is None
    (tmp_path / "mine").mkdir()
    assert local_folder(ModelConfig(name="mine")) == Path("mine")


def test_the_built_in_model_is_the_pretrained_one_where_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "WEIGHTS_DIR", tmp_path / "weights")
    toy, builtin = ModelConfig(name="builtin-random"), ModelConfig(name="builtin")
    assert is_builtin(toy)
    assert is_builtin(builtin)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    assert is_builtin(toy)
    assert local_folder(toy) is None
    assert not is_builtin(builtin)
    assert local_folder(builtin) == tmp_path / "weights"


@pytest.mark.parametrize("name", ["./qwen-tinny", "/nowhere/at/all", "~/no-such-folder", "a/b/c", "with space"])
def test_a_path_to_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen-tiny").mkdir()
    with pytest.raises(ModelError, match="does not exist"):
        local_folder(ModelConfig(name=name))


def test_an_address_is_no_folder() -> None:
    with pytest.raises(ModelError, match=r"'s3://models/mine' is an address.*copy it to a folder"):
        local_folder(ModelConfig(name="s3://models/mine"))


def test_a_path_to_nothing_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "qwen-tiny").mkdir()
    with pytest.raises(ModelError, match="Did you mean 'qwen-tiny'"):
        local_folder(ModelConfig(name=str(tmp_path / "qwen-tinny")))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        local_folder(ModelConfig(name=str(tmp_path / "model.gguf")))


def test_pickles_are_never_among_the_files(tmp_path: Path) -> None:
    for name in (
        "model.safetensors",
        "config.json",
        "merges.txt",
        "pytorch_model.bin",
        "x.pt",
        "modeling.py",
        "README.md",
    ):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in checkpoint_files(tmp_path)] == ["config.json", "merges.txt", "model.safetensors"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\x10", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0{}tail", b"\x02\0\0\0\0\0\0\0[]", b"\x04\0\0\0\0\0\0\0nope"],
)
def test_damaged_headers(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="no whole safetensors file"):
        check_weights(tmp_path)


class TestHub:
    @pytest.fixture(autouse=True)
    def _empty_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_cache() -> None:
            raise errors.CacheNotFound("none", cache_dir="none")

        monkeypatch.setattr(huggingface_hub, "scan_cache_dir", no_cache)

    @staticmethod
    def answer_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        def model_info(self: Any, *args: Any, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)

    @staticmethod
    def response(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
        return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid")))

    def test_the_resolved_commit_is_fetched_without_pickles(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        asked: dict[str, Any] = {}

        def model_info(self: Any, name: str, *, revision: str | None, timeout: float) -> Any:
            asked.update(name=name, revision=revision)
            return type("Info", (), {"sha": COMMIT})

        def snapshot_download(
            name: str, *, revision: str, allow_patterns: list[str], ignore_patterns: list[str]
        ) -> str:
            asked.update(commit=revision, patterns=allow_patterns, ignored=ignore_patterns)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        assert fetch_from_hub(ModelConfig(name="some/model", revision="v1")) == tmp_path
        assert (asked["name"], asked["revision"], asked["commit"]) == ("some/model", "v1", COMMIT)
        repository = ["config.json", "a-00001.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt", "README.md",
                      "model.bin", "code.py", "x.pt", "original/m.safetensors", "consolidated.safetensors"]  # fmt: skip
        taken = huggingface_hub.utils.filter_repo_objects(
            repository, allow_patterns=asked["patterns"], ignore_patterns=asked["ignored"]
        )
        assert list(taken) == repository[:5]

    def test_a_full_commit_needs_no_look_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer_with(monkeypatch, AssertionError("asked the Hub"))
        assert hub_commit(ModelConfig(name="some/model", revision=COMMIT)) == COMMIT

    def test_an_unknown_name_lists_near_ones(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        self.answer_with(monkeypatch, self.response(errors.RepositoryNotFoundError, 404))
        with pytest.raises(
            ModelError, match=r"'buildin' is neither a folder here nor a model on the Hub.*Did you mean 'builtin'"
        ):
            hub_commit(ModelConfig(name="buildin"))

    def test_an_unknown_revision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer_with(monkeypatch, self.response(errors.RevisionNotFoundError, 404))
        with pytest.raises(ModelError, match="'v9' is no branch, tag or commit of 'some/model'"):
            hub_commit(ModelConfig(name="some/model", revision="v9"))

    def test_a_gated_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer_with(monkeypatch, self.response(errors.GatedRepoError, 403))
        with pytest.raises(ModelError, match="is gated on the Hub; accept its conditions"):
            hub_commit(ModelConfig(name="some/model"))

    def test_a_failing_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer_with(monkeypatch, self.response(errors.HfHubHTTPError, 500))
        with pytest.raises(ModelError, match="the Hub failed on 'some/model'"):
            hub_commit(ModelConfig(name="some/model"))

    @pytest.mark.parametrize("error", [httpx.ReadTimeout("slow"), errors.LocalEntryNotFoundError("gone")])
    def test_a_broken_download(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        def snapshot_download(*args: Any, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        with pytest.raises(ModelError, match=r"the download of 'some/model' broke off .*what has arrived is kept"):
            fetch_from_hub(ModelConfig(name="some/model", revision=COMMIT))

    @pytest.mark.parametrize("error", [httpx.ConnectError("no route"), errors.OfflineModeIsEnabled("offline")])
    def test_offline_without_a_copy(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        self.answer_with(monkeypatch, error)
        with pytest.raises(
            ModelError, match=r"not in the local Hub cache, and the Hub cannot be reached.*give a folder"
        ):
            hub_commit(ModelConfig(name="no-one/has-this-model"))

    def test_offline_with_a_copy(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.answer_with(monkeypatch, httpx.ConnectError("no route"))
        monkeypatch.setattr(
            huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path / "snapshots" / COMMIT)
        )
        assert hub_commit(ModelConfig(name="some/model")) == COMMIT


def test_the_module_is_light() -> None:
    assert not hasattr(source, "huggingface_hub")
