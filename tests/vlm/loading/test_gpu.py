"""Loading on a GPU: found without torch, quantised there, reloaded to the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.tiny_models import fitted, tiny_conversation
from vlm.config.model import ModelConfig, Quantization
from vlm.loading.build import build_checkpoint
from vlm.loading.checkpoint import LoadedModel, load_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def logits_of(loaded: LoadedModel) -> torch.Tensor:
    messages, images = tiny_conversation()
    images = fitted(loaded.processing, images)
    ids = torch.tensor([loaded.processing.encode(messages, [image.shape[:2] for image in images]).input_ids])
    inputs = loaded.processing.model_inputs(ids, loaded.processing.pixel_inputs(images))
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with torch.no_grad():
        output = loaded.model(input_ids=ids.cuda(), **moved)
    return output.logits.cpu()  # type: ignore[no-any-return]


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_builds_and_reloads(
    sources: dict[str, Path], model_type: str, quantization: Quantization, tmp_path: Path
) -> None:
    settings = ModelConfig(name=str(sources[model_type]), quantization=quantization)
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        build_checkpoint(settings, folder, device="cuda", dtype="bfloat16")
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} for folder in folders
    )
    assert first == second
    loaded = [load_checkpoint(folder, device="cuda") for folder in folders]
    assert {parameter.device.type for parameter in loaded[0].model.parameters()} == {"cuda"}
    assert torch.equal(logits_of(loaded[0]), logits_of(loaded[1]))
    assert logits_of(loaded[0]).dtype == torch.bfloat16


def test_the_device_is_found_without_torch() -> None:
    code = (
        "import sys; from vlm.loading.device import detect_device, resolve_precision;"
        " print(detect_device('auto'), resolve_precision('auto', 'cuda'), 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    precision = "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"
    assert found == ["cuda", precision, "False"]
