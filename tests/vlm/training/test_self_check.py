"""The check of kernels on the card: plain forms agree with each other here, and wrong ones are caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlm.config import TrainingConfig
from vlm.errors import ResourceError
from vlm.training.self_check import check_kernels

ALL = ["RMSNorm", "LayerNorm", "activations", "rotary embedding", "NF4 dequantisation", "packed attention"]
ON_CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


def test_what_is_used_is_compared() -> None:
    assert check_kernels(TrainingConfig(), packing=True, quantized=True, **ON_CPU) == ALL
    assert check_kernels(TrainingConfig(), packing=False, quantized=False, **ON_CPU) == ALL[:4]
    assert check_kernels(TrainingConfig(fused_kernels=False), packing=True, quantized=True, **ON_CPU) == ALL[5:]
    on_host = {"packing": True, "quantized": True, "embedding_on_host": True}
    assert check_kernels(TrainingConfig(), **on_host, **ON_CPU) == [*ALL, "embedding in host memory"]


def negated(function: Any) -> Any:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        if output is None:  # written in place
            kwargs["gradient"].mul_(1.001)
            return None
        return (output[0], -output[1]) if isinstance(output, tuple) else 1.001 * output

    return wrong


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("vlm.kernels.rms_norm.rms_norm", r"RMSNorm \(output 0\).*training.fused_kernels to false"),
        ("vlm.kernels.layer_norm.layer_norm", r"LayerNorm \(output 0\)"),
        ("vlm.kernels.activation.activate_backward", r"activations \(silu gradient\)"),
        ("vlm.kernels.rotary.rotary", r"rotary embedding \(output 1\)"),
        ("vlm.kernels.frozen_linear.dequantized", r"NF4 dequantisation \(weight\)"),
        ("vlm.packing.attention.attend", r"packed attention \(causal output 0\).*training.packing to false"),
        (
            "vlm.kernels.host_embedding.host_embedding",
            r"embedding in host memory \(rows\).*_memory to 'recompute', and",
        ),
    ],
)
def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, place: str, message: str) -> None:
    import importlib

    module, _, name = place.rpartition(".")
    monkeypatch.setattr(place, negated(getattr(importlib.import_module(module), name)))
    with pytest.raises(ResourceError, match=message):
        check_kernels(TrainingConfig(), packing=True, quantized=True, embedding_on_host=True, **ON_CPU)


def test_attention_that_lets_a_neighbour_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.packing import attention

    attend = attention.attend

    def leaky(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        # Nothing that a sum of finite numbers would show.
        return attend(query, key, value, *args, **kwargs) + 0 * value.sum()

    monkeypatch.setattr(attention, "attend", leaky)
    with pytest.raises(ResourceError, match=r"packed attention \(neighbour\).* nan away"):
        check_kernels(TrainingConfig(), packing=True, quantized=False, **ON_CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_of_this_gpu(dtype: torch.dtype) -> None:
    used = {"packing": True, "quantized": True, "embedding_on_host": True}
    found = check_kernels(TrainingConfig(), device="cuda", dtype=dtype, **used)
    assert found == [*ALL, "embedding in host memory"]
