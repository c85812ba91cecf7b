"""The digest of a model follows its content, not its place, and reads unchanged files once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.builtin import recipe
from vlm.config.model import ModelConfig
from vlm.errors import ModelError
from vlm.loading import identity
from vlm.loading.identity import model_digest, pin_revision

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(name * 100)
        os.utime(folder / name, (1, 1))
    return folder


def digest(path: Path, cache_dir: Path | None = None) -> tuple[str, int]:
    read: list[int] = []
    return model_digest(ModelConfig(name=str(path)), cache_dir=cache_dir, on_bytes=read.append), sum(read)


def test_it_follows_content_and_not_place(folder: Path, tmp_path: Path) -> None:
    first = digest(folder)
    assert len(first[0]) == 64
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert digest(copy) == first
    (copy / "README.md").write_text("not part of the model")
    assert digest(copy) == first
    (copy / "tokenizer.json").rename(copy / "vocab.json")
    assert digest(copy)[0] != first[0]
    (copy / "vocab.json").rename(copy / "tokenizer.json")
    (copy / "model.safetensors").write_text("other")
    assert digest(copy)[0] != first[0]


def test_unchanged_files_are_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.data.stat_cache.RECENT_SECONDS", -1.0)
    cache = tmp_path / "cache"
    value, read = digest(folder, cache)
    assert read == sum(path.stat().st_size for path in folder.iterdir())
    assert digest(folder, cache) == (value, 0)
    (folder / "config.json").write_text("changed")
    assert digest(folder, cache)[0] != value


def test_hub_models_count_by_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter([COMMIT, "f" * 40, COMMIT])
    monkeypatch.setattr(identity, "hub_commit", lambda model: next(commits))
    hub = ModelConfig(name="some/model")
    first, second, third = (model_digest(hub, cache_dir=None) for _ in range(3))
    assert first == third != second


def test_pinning(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(identity, "hub_commit", lambda model: COMMIT)
    assert pin_revision(ModelConfig(name="some/model", quantization="int8")) == ModelConfig(
        name="some/model", quantization="int8", revision=COMMIT
    )
    for model in (ModelConfig(), ModelConfig(name=str(folder))):
        assert pin_revision(model) is model


def test_builtin_counts_by_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ModelConfig(name="builtin-random")
    first = model_digest(toy, cache_dir=None)
    assert model_digest(toy.model_copy(update={"quantization": "none"}), cache_dir=None) == first
    monkeypatch.setattr(identity, "RECIPE", recipe.RECIPE + " changed")
    assert model_digest(toy, cache_dir=None) != first


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        digest(tmp_path / "nothing")


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from vlm.config import ModelConfig; from vlm.loading.identity import model_digest;"
        " model_digest(ModelConfig(), cache_dir=None); print({'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )
