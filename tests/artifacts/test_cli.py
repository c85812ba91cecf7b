"""``python -m artifacts``, and what importing the package costs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from artifacts import Store
from artifacts.__main__ import main

from .conftest import flip_byte, publish, stored


@pytest.fixture
def filled(file_store: Store) -> Store:
    for number in range(3):
        ref = publish(
            file_store, {f"{i}.bin": bytes([i]) * 2000 for i in range(number + 20)}, metadata={"rows": number}
        )
        file_store.record("prepare_dataset", f"{number:064x}", {}, {"dataset": ref})
    publish(file_store, {"loose": b"x" * 5000}, kind="plan", provenance={"producer": "somebody"})
    return file_store


def test_ls(filled: Store, capsys: pytest.CaptureFixture[str]):
    assert main(["ls", "--store", filled.url, "--limit", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["recorded", "(UTC)", "step", "output", "digest", "size", "files"]
    assert [line.split()[-1] for line in lines[1:3]] == ["22", "21"]
    assert lines[3] == "… and 1 older records (--limit 3 shows all)"
    assert max(map(len, lines)) <= 100


def test_show(filled: Store, capsys: pytest.CaptureFixture[str]):
    digest = filled.records("prepare_dataset")[0].outputs["dataset"].digest
    assert main(["show", digest[:10], "--store", filled.url]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"dataset  {digest}\n43.0 KiB in 22 files\n")
    assert '"rows": 2' in out
    assert out.endswith("… and 2 more files\n")
    assert len(out.splitlines()) <= 40
    assert main(["show", "", "--store", filled.url]) == 2
    assert "give more digits" in capsys.readouterr().err
    assert main(["show", "zz", "--store", filled.url]) == 2
    assert "no artifact's digest starts with 'zz'" in capsys.readouterr().err


def test_verify(filled: Store, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--store", filled.url]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("3 records, 4 artifacts, 23 objects, 47.9 KiB\nEverything is whole.\n")
    assert captured.err == ""
    path = stored(filled, "objects")[0]
    flip_byte(filled, path)
    assert main(["verify", "--store", filled.url]) == 1
    assert f"{path}: holds other bytes" in capsys.readouterr().out
    assert main(["verify", "--remove", "--store", filled.url]) == 1
    assert "1 problem. What was corrupt is removed" in capsys.readouterr().out
    assert filled.backend.info(path) is None


def test_gc(filled: Store, capsys: pytest.CaptureFixture[str]):
    command = ["gc", "--store", filled.url, "--keep-last", "1", "--grace-hours", "0"]
    assert main([*command, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert "would remove 4.9 KiB" in dry
    assert main(command) == 0
    assert capsys.readouterr().out == dry.replace("would remove", "removed")
    assert "kept: 1 record, 1 artifact, 43.0 KiB" in dry


def test_an_empty_store_and_a_wrong_address(capsys: pytest.CaptureFixture[str], file_store: Store):
    assert main(["ls", "--store", file_store.url]) == 0
    assert "no step has recorded anything" in capsys.readouterr().out
    assert main(["gc", "--store", "nonsense://x"]) == 2
    assert "does not know this kind of address" in capsys.readouterr().err


def test_importing_is_light_and_the_module_runs(run_python: Callable[..., subprocess.Popen[str]], file_store: Store):
    code = (
        "import sys; import artifacts.store, artifacts.gc\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'pydantic', 'transformers', 'mlflow', 'prefect', 'fsspec', 'asyncio', 'vlm'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "import runpy; sys.argv = ['artifacts', 'ls', '--store', sys.argv[1]]; runpy.run_module('artifacts', run_name='__main__')"
    )
    output, errors = run_python(code, file_store.url).communicate(timeout=60)
    assert errors == ""
    assert output.splitlines() == ["[]", f"{file_store.url}: no step has recorded anything."]
