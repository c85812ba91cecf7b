"""Which device and precision a run takes, found out without importing torch (which takes seconds)."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Literal

from vlm.config.model import Precision, Quantization
from vlm.errors import ResourceError

Device = Literal["cpu", "cuda"]

_CAPABILITY_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR in cuda.h
_BFLOAT16_CAPABILITY = 8  # Ampere; older GPUs only emulate bfloat16


def detect_device(requested: str) -> Device:
    """Settles the device of a run.

    Args:
        requested: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Returns:
        ``"cuda"`` where it is asked for or ``"auto"``, PyTorch is a CUDA build and the driver shows a GPU; else ``"cpu"``.

    Raises:
        ResourceError: CUDA is asked for and not there; says what is missing.
    """
    if requested == "cpu":
        return "cpu"
    missing = _missing_for_cuda()
    if missing is None:
        return "cuda"
    if requested == "cuda":
        raise ResourceError(f"runtime.device is 'cuda', but {missing}; or set runtime.device to 'auto' or 'cpu'")
    return "cpu"


def count_gpus() -> int:
    """GPUs that the driver shows, of those that CUDA_VISIBLE_DEVICES leaves."""
    return _driver_devices()[0]


def resolve_precision(precision: Precision, device: str) -> str:
    """Settles ``"auto"``: bfloat16 on a GPU that has it, float16 on an older one, float32 on a CPU.

    Args:
        precision: The setting.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        Name of a torch dtype.

    Raises:
        ResourceError: A 16-bit precision on a CPU, where matrix products in it end the process on some machines.
    """
    if device == "cpu":
        if precision not in ("auto", "float32"):
            raise ResourceError(
                f"model.precision {precision!r} cannot be used on a CPU, where some machines lack the instructions for it and"
                " end the process; set model.precision to 'auto' or 'float32', or run on a GPU"
            )
        return "float32"
    if precision != "auto":
        return precision
    _, capability = _driver_devices()
    return "bfloat16" if capability >= _BFLOAT16_CAPABILITY else "float16"


def resolve_quantization(quantization: Quantization, device: str, *, full_finetuning: bool = False) -> Quantization:
    """Settles ``"auto"``: NF4 on a GPU, where memory is scarce; none on a CPU, where unpacking costs more than it saves.

    Args:
        quantization: The setting.
        device: ``"cpu"`` or ``"cuda"``.
        full_finetuning: Weights are to be trained themselves, so none.
    """
    if quantization != "auto":
        return quantization
    return "none" if device == "cpu" or full_finetuning else "nf4"


def _missing_for_cuda() -> str | None:
    """What stands against CUDA, with its remedy; None if nothing does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU; unset it"
    cuda_version = _torch_cuda_version()
    if cuda_version is None:
        return "the installed PyTorch is a CPU build; install a CUDA build of torch"
    if _driver_devices()[0] == 0:
        return "the NVIDIA driver shows no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


@lru_cache(maxsize=1)
def _torch_cuda_version() -> str | None:
    """CUDA version that the installed torch was built with, read from its `version.py`."""
    if "torch" in sys.modules:
        return sys.modules["torch"].version.cuda
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("version.py")
    if not path.is_file():
        return None
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        value = getattr(statement, "value", None)
        if isinstance(target, ast.Name) and target.id == "cuda" and isinstance(value, ast.Constant):
            return value.value if isinstance(value.value, str) else None
    return None


@lru_cache(maxsize=1)
def _driver_devices() -> tuple[int, int]:
    """Number of GPUs that the driver shows (it honours CUDA_VISIBLE_DEVICES), and the first one's capability."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0, 0
    count, major, first = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return 0, 0
    if driver.cuDeviceGet(ctypes.byref(first), 0) != 0:
        return 0, 0
    if driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, first) != 0:
        return count.value, 0
    return count.value, major.value
