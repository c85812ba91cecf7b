"""Whether Triton kernels run. Triton comes with PyTorch for CUDA and is not needed elsewhere."""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def use_triton(x: Tensor) -> bool:
    """Whether a kernel runs over a tensor: on CUDA, or anywhere under Triton's own interpreter.

    Args:
        x: An input of the kernel.
    """
    return has_triton() and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
