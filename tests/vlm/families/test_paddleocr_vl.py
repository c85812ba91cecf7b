"""PaddleOCR-VL: sizes against the stock processor, and checkpoints as they are published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.support.tiny_models import make_tiny_checkpoint, tiny_conversation
from vlm.config import ModelConfig
from vlm.errors import DataError
from vlm.loading.build import build_checkpoint
from vlm.loading.checkpoint import load_checkpoint
from vlm.processing import Processing

SIDES = st.one_of(st.integers(1, 60), st.integers(1, 3000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint("paddleocr_vl", tmp_path_factory.mktemp("paddleocr_vl"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> Processing:
    return Processing.from_dir(folder)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(height=SIDES, width=SIDES, limits=st.none() | st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)))
@example(height=1, width=200, limits=None)
@example(height=3, width=1, limits=None)
def test_target_size_is_the_stock_one(
    ours: Processing, height: int, width: int, limits: tuple[int, int] | None
) -> None:
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import smart_resize

    smallest, largest = sorted(limits) if limits else (4 * 28 * 28, 256 * 28 * 28)
    try:
        expected = smart_resize(height, width, 28, smallest, largest)
    except ValueError:
        with pytest.raises(DataError, match=f"{height} x {width} pixels is more elongated than 1 : 200"):
            ours.target_size(height, width)
        return
    assert ours.target_size(height, width, *(sorted(limits) if limits else ())) == expected


def test_a_published_checkpoint_is_read(folder: Path, tmp_path: Path) -> None:
    """Its language model's settings stand at the top level, its tower has the whole model's type, its weights old names."""
    source, checkpoint = tmp_path / "source", tmp_path / "checkpoint"
    source.mkdir()
    checkpoint.mkdir()
    for path in folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    text.pop("model_type")
    config["vision_config"]["model_type"] = "paddleocr_vl"
    (source / "config.json").write_text(json.dumps({**text, **config}))
    keys = load_file(folder / "model.safetensors")
    assert {key.partition(".")[0] for key in keys} == {"lm_head", "mlp_AR", "model", "visual"}
    loaded = []
    for number, place in enumerate((source, folder)):
        target = checkpoint / str(number)
        target.mkdir()
        config = ModelConfig(name=str(place), quantization="none", precision="float32")
        build_checkpoint(config, target, device="cpu", dtype="float32")
        loaded.append(load_checkpoint(target, device="cpu"))
    messages, images = tiny_conversation()
    logits = []
    for model in loaded:
        assert model.processing.context_length_tokens == 4096
        ids = torch.tensor([model.processing.encode(messages, [image.shape[:2] for image in images]).input_ids])
        inputs = model.processing.model_inputs(ids, model.processing.pixel_inputs([images]))
        with torch.no_grad():
            logits.append(model.model(input_ids=ids, **inputs).logits)
    assert torch.equal(logits[0], logits[1])
