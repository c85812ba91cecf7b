"""Pixtral and Mistral 3: sizes, rows of tokens and padded images against the stock processor."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.tiny_family import stock_pixels
from tests.support.tiny_models import TINY, make_tiny_checkpoint, tiny_image
from vlm.errors import DataError
from vlm.families import Run
from vlm.processing import Processing

LONGEST = 336
SIDES = st.one_of(st.integers(1, 60), st.integers(1, 3000))
RELAXED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture], "derandomize": True}


@dataclass(frozen=True)
class Pair:
    folder: Path
    ours: Processing
    stock: Any
    token_side: int


@pytest.fixture(scope="module", params=["pixtral", "mistral3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = make_tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    stock = TINY[request.param].stock_processor(folder)
    return Pair(folder, Processing.from_dir(folder), stock, {"pixtral": 14, "mistral3": 28}[request.param])


@settings(max_examples=300, **RELAXED)
@given(height=SIDES, width=SIDES)
def test_target_size_is_the_stock_one(pair: Pair, height: int, width: int) -> None:
    from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

    # Zero-size arrays of that shape: only the shape is looked at, and pages need not be allocated.
    image = torch.empty(1).expand(height, width, 3).numpy()
    expected = get_resize_output_image_size(image, LONGEST, pair.token_side, "channels_last")
    if 0 in expected:
        with pytest.raises(DataError, match=f"{height} x {width} pixels has no height or width left"):
            pair.ours.target_size(height, width)
        return
    assert pair.ours.target_size(height, width) == expected


@settings(max_examples=300, **RELAXED)
@given(height=st.integers(14, 3000), width=st.integers(14, 3000), limit=st.integers(1, 200_000))
def test_limits(pair: Pair, height: int, width: int, limit: int) -> None:
    side = pair.token_side
    rows, columns = (length // side for length in pair.ours.target_size(height, width, max_pixels=limit))
    usual = pair.ours.target_size(height, width)
    assert rows * columns * side**2 <= limit or 1 in (rows, columns)
    assert rows * side <= usual[0]
    assert columns * side <= usual[1]
    rows, columns = (length // side for length in pair.ours.target_size(height, width, min_pixels=limit))
    assert max(rows, columns) * side <= LONGEST
    assert rows * columns * side**2 >= limit or max(rows, columns) * side >= LONGEST - side
    assert rows * side >= usual[0]


@pytest.mark.parametrize("size", [(56, 84), (28, 28), (336, 28)])
def test_rows_of_tokens_are_the_stock_ones(pair: Pair, size: tuple[int, int]) -> None:
    layout = pair.ours.family.image_layout(pair.ours._parts, *size)
    written = "".join(piece.token * piece.count if isinstance(piece, Run) else piece for piece in layout)
    assert written == pair.stock.replace_image_token({"image_sizes": [size]}, 0)
    (counted,) = pair.stock._get_num_multimodal_tokens([size])["num_image_tokens"]
    assert pair.ours.num_image_tokens(*size) == counted


def test_images_of_several_sizes_are_padded_like_the_stock_ones(pair: Pair) -> None:
    rows = [[tiny_image(56, 84, 1), tiny_image(112, 28, 2)], [], [tiny_image(28, 140, 3)]]
    ours = pair.ours.pixel_inputs(rows)
    expected = stock_pixels(TINY[pair.ours.family.model_type], pair.stock, rows)
    assert ours["pixel_values"].shape == (3, 3, 112, 140)
    for name in ("pixel_values", "image_sizes"):
        assert torch.equal(ours[name], torch.as_tensor(expected[name])), name


def test_one_feature_per_image_token(pair: Pair) -> None:
    """What transformers checks only when the model runs."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(pair.folder).eval()
    sizes = [(56, 84), (28, 140)]
    inputs = pair.ours.pixel_inputs([tiny_image(*size) for size in sizes])
    with torch.no_grad():
        features = model.get_image_features(**inputs).pooler_output
    for size, feature in zip(sizes, features, strict=True):
        layout = pair.ours.family.image_layout(pair.ours._parts, *size)
        images = sum(piece.count for piece in layout if isinstance(piece, Run) and piece.token == "[IMG]")
        assert len(feature) == images == math.prod(size) // pair.token_side**2


def test_the_processors_patch_size_wins_and_has_a_default(pair: Pair, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(pair.folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "processor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "patch_size": 7, "spatial_merge_size": 1}))
    assert Processing.from_dir(tmp_path).target_size(8, 15) == (14, 21)
    path.unlink()
    assert Processing.from_dir(tmp_path).target_size(8, 17) == (16, 32)
