"""What bitsandbytes writes that means nothing here."""

import logging

import pytest

from vlm.loading.quantization import silence_bitsandbytes


def test_two_notes_are_dropped_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    silence_bitsandbytes()
    silence_bitsandbytes()
    ops, functions = (logging.getLogger(f"bitsandbytes.{name}") for name in ("backends.cpu.ops", "autograd._functions"))
    assert len(ops.filters) == len(functions.filters) == 1
    ops.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no module")
    functions.warning("MatMul8bitLt: inputs will be cast from %s to float16 during quantization", "float32")
    ops.warning("something else")
    functions.warning("something else")
    assert [record.name for record in caplog.records] == [ops.name, functions.name]
