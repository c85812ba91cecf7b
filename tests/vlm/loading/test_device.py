"""Devices and precisions, with drivers and torch builds made up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from vlm.errors import ResourceError
from vlm.loading import device
from vlm.loading.device import detect_device, resolve_precision, resolve_quantization

CACHED = (device._torch_cuda_version, device._driver_devices)


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


def machine(
    monkeypatch: pytest.MonkeyPatch, *, cuda_build: str | None = "13.0", num_gpus: int = 1, capability: int = 9
) -> None:
    monkeypatch.setattr(device, "_torch_cuda_version", lambda: cuda_build)
    monkeypatch.setattr(device, "_driver_devices", lambda: (num_gpus, capability))


def test_a_gpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    assert detect_device("auto") == "cuda"
    assert detect_device("cuda") == "cuda"
    assert detect_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("cuda_build", "num_gpus", "visible", "reason"),
    [
        (None, 1, None, "the installed PyTorch is a CPU build; install a CUDA build"),
        ("13.0", 0, None, "the NVIDIA driver shows no GPU"),
        ("13.0", 1, "", "CUDA_VISIBLE_DEVICES='' hides every GPU"),
        ("13.0", 1, "-1", "CUDA_VISIBLE_DEVICES='-1' hides every GPU"),
    ],
)
def test_no_gpu(
    monkeypatch: pytest.MonkeyPatch, cuda_build: str | None, num_gpus: int, visible: str | None, reason: str
) -> None:
    machine(monkeypatch, cuda_build=cuda_build, num_gpus=num_gpus)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert detect_device("auto") == "cpu"
    with pytest.raises(ResourceError, match=f"runtime.device is 'cuda', but {reason}.*'auto' or 'cpu'"):
        detect_device("cuda")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "13.0"),
        ("cuda = '12.8'\n", "12.8"),
        ("cuda: Optional[str] = None\n", None),
        ("__version__ = '1'\n", None),
        (None, None),
    ],
)
def test_the_build_is_read_from_torchs_version_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, expected: str | None
) -> None:
    if text is not None:
        (tmp_path / "version.py").write_text(text)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(
        device.importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin=str(tmp_path / "__init__.py"))
    )
    assert device._torch_cuda_version() == expected


def test_no_torch_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert device._torch_cuda_version() is None


def test_it_agrees_with_torch() -> None:
    import torch

    assert device._driver_devices()[0] == (
        torch.cuda.device_count() if torch.version.cuda else device._driver_devices()[0]
    )
    assert detect_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_machine_without_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(device.ctypes, "CDLL", missing)
    assert device._driver_devices() == (0, 0)


@pytest.mark.parametrize(("capability", "expected"), [(9, "bfloat16"), (8, "bfloat16"), (7, "float16")])
def test_auto_precision_goes_by_the_gpu(monkeypatch: pytest.MonkeyPatch, capability: int, expected: str) -> None:
    machine(monkeypatch, capability=capability)
    assert resolve_precision("auto", "cuda") == expected
    assert resolve_precision("float32", "cuda") == "float32"


def test_a_cpu_computes_in_float32() -> None:
    assert resolve_precision("auto", "cpu") == "float32"
    assert resolve_precision("float32", "cpu") == "float32"
    with pytest.raises(ResourceError, match=r"model.precision 'bfloat16' cannot be used on a CPU.*'auto' or 'float32'"):
        resolve_precision("bfloat16", "cpu")


def test_auto_quantisation_goes_by_the_device() -> None:
    assert resolve_quantization("auto", "cpu") == "none"
    assert resolve_quantization("auto", "cuda") == "nf4"
    assert resolve_quantization("auto", "cuda", full_finetuning=True) == "none"
    assert [resolve_quantization("int8", device) for device in ("cpu", "cuda")] == ["int8", "int8"]


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from vlm.loading.device import detect_device, resolve_precision;"
        " resolve_precision('auto', detect_device('auto')); print('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
