"""Exported GGUF files in llama.cpp itself, where llama_cpp is installed, against the trained model in transformers."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vlm.export.test_export import PLAIN, make_adapter, run_export
from tests.vlm.export.test_verify import reference_of, verify
from vlm.errors import ExportError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama_cpp is not installed")


@pytest.fixture
def gate(gguf_run: Callable, tmp_path: Path) -> Callable[..., Any]:
    """Exports a model and has llama.cpp run it in a fresh process."""

    def run_gate(name: str, gguf_type: str) -> Any:
        run = gguf_run(name)
        adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
        reference = reference_of(run, adapter, tmp_path / "reference")
        run_export("gguf", run, adapter, tmp_path / "out", gguf_type=gguf_type)
        return verify("gguf", run, tmp_path / "out", reference, gguf_type=gguf_type, runner=None)

    return run_gate


@pytest.mark.parametrize("name", ["qwen2_vl", "builtin", "pixtral", "mistral3"])
def test_llama_cpp_gives_the_trained_models_logits_and_answers(gate: Callable, tmp_path: Path, name: str) -> None:
    verification = gate(name, "f16")
    assert verification.num_rows == 2
    # Weights and activations in float16 (2^-11 each) through a few layers; 0.001 to 0.0023 where it was measured.
    assert verification.distance < 5e-3
    assert verification.kept == pytest.approx(1, abs=5e-3)
    assert verification.metric_value == verification.metric_reference
    assert json.loads((tmp_path / "out" / "verification.json").read_text()) == verification.to_json()
    assert "with llama.cpp and compared" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("gguf_type", "bound"), [("bf16", 0.02), ("q8_0", 0.06), ("q4_0", 0.5)])
def test_other_types(gate: Callable, gguf_type: str, bound: float) -> None:
    # Twice what was measured, as random matrices and activations of 64 numbers are rounded to 8 and 4 bits.
    assert gate("qwen2_vl", gguf_type).distance < bound


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        # Consistent with itself, so that a comparison of tensors sees nothing.
        ({"interleaved_language": False}, "gives logits that are"),
        ({"interleaved_vision": False}, "gives logits that are"),
        ({"projector": "none"}, r"does not load mmproj-f16.gguf.*unknown projector type"),
        ({"architecture": "qwen2vl"}, r"does not load model-f16.gguf.*rope.dimension_sections"),
    ],
)
def test_files_that_llama_cpp_reads_otherwise_are_noticed(
    gate: Callable, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str
) -> None:
    from vlm.families import FAMILIES

    layout = dataclasses.replace(FAMILIES["pixtral"].gguf, **changed)
    monkeypatch.setattr("vlm.export.gguf.design.check_supported", lambda family: layout)
    with pytest.raises(ExportError, match=message):
        gate("pixtral", "f16")


def test_a_tokenizer_that_llama_cpp_does_not_know_is_noticed(gate: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.export.gguf.metadata.pre_tokenizer", lambda layout, description: "default")
    with pytest.raises(ExportError, match=r"cuts text into other tokens than the model's tokenizer, such as"):
        gate("qwen2_vl", "f16")
