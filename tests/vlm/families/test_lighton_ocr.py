"""LightOnOCR: sizes where the image processor rounds to patches or to tokens, and configs that name another type."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.tiny_family import stock_pixels
from tests.support.tiny_models import TINY, make_tiny_checkpoint, tiny_conversation, tiny_image
from vlm.config import ModelConfig
from vlm.errors import DataError
from vlm.families import Run, family_for_config
from vlm.loading.build import build_checkpoint
from vlm.loading.checkpoint import load_checkpoint
from vlm.processing import Processing

LONGEST = 336


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint("lighton_ocr", tmp_path_factory.mktemp("lighton_ocr"))


@pytest.fixture(scope="module", params=[28, 14, {"height": 14, "width": 14}], ids=["token", "patch", "by side"])
def rounding(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Processing, Path]:
    copy = tmp_path_factory.mktemp("rounding")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    config = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps({**config, "patch_size": request.param}))
    return 28 if request.param == 28 else 14, Processing.from_dir(copy), copy


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(height=st.integers(1, 2000), width=st.integers(1, 2000))
def test_target_size_is_the_stock_one(rounding: tuple[int, Processing, Path], height: int, width: int) -> None:
    from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

    side, ours, _ = rounding
    image = torch.empty(1).expand(height, width, 3).numpy()  # only its shape is looked at
    expected = get_resize_output_image_size(image, LONGEST, side, "channels_last")
    if 0 in expected:
        with pytest.raises(DataError, match="has no height or width left"):
            ours.target_size(height, width)
    elif min(expected) < 28:  # stock transformers has no token for it and stops in the projector
        with pytest.raises(DataError, match=f"{height} x {width} pixels is smaller than the 28 x 28 of a single token"):
            ours.target_size(height, width)
    else:
        assert ours.target_size(height, width) == expected


def test_pixels_and_tokens_where_patches_are_left_over(rounding: tuple[int, Processing, Path]) -> None:
    side, ours, copy = rounding
    image = Image.fromarray(tiny_image(70, 100))
    size = ours.target_size(70, 100)
    assert size == ((84, 112) if side == 28 else (70, 112))
    layout = ours.family.image_layout(ours._parts, *size)
    assert layout == (Run("<|image_pad|>", 3 * 4 if side == 28 else 2 * 4),)
    facts = TINY["lighton_ocr"]
    stock = facts.stock_processor(copy)
    pixels = ours.pixel_inputs([ours.resize_image(image, size)])
    expected = stock_pixels(facts, stock, [[image]])
    assert torch.equal(pixels["pixel_values"], expected["pixel_values"])
    assert torch.equal(pixels["image_sizes"], torch.as_tensor(expected["image_sizes"]))
    model = load_source(copy)
    messages, _ = tiny_conversation()
    ids = torch.tensor([ours.encode(messages, [size]).input_ids])
    with torch.no_grad():
        assert model(input_ids=ids, **ours.model_inputs(ids, pixels)).logits.isfinite().all()


def load_source(folder: Path) -> torch.nn.Module:
    from transformers import LightOnOcrForConditionalGeneration

    return LightOnOcrForConditionalGeneration.from_pretrained(folder).eval()


def test_a_config_that_says_mistral3(folder: Path, tmp_path: Path) -> None:
    """As in files made for servers, from before transformers had the class."""
    source, checkpoint = tmp_path / "source", tmp_path / "checkpoint"
    shutil.copytree(folder, source)
    checkpoint.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LightOnOCRForConditionalGeneration"], "model_type": "mistral3"}
    config["image_token_index"] = config.pop("image_token_id")
    (source / "config.json").write_text(json.dumps(config))
    assert family_for_config(config).model_type == "lighton_ocr"
    build_checkpoint(
        ModelConfig(name=str(source), quantization="none", precision="float32"),
        checkpoint,
        device="cpu",
        dtype="float32",
    )
    loaded = load_checkpoint(checkpoint, device="cpu")
    plain = load_source(folder)
    assert type(loaded.model) is type(plain)
    assert loaded.model.config.image_token_id == plain.config.image_token_id
    written = json.loads((checkpoint / "model" / "config.json").read_text())
    assert written["model_type"] == "lighton_ocr"
    assert written["architectures"] == ["LightOnOcrForConditionalGeneration"]
    weights = plain.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.model.state_dict().items())
