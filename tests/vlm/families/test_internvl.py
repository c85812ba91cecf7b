"""InternVL's tiles against the stock processor, with the published number of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.tiny_family import stock_pixels
from tests.support.tiny_models import TINY, make_tiny_checkpoint, tiny_image
from vlm.families import FAMILIES, MediaParts
from vlm.families.internvl_media import patches_per_token
from vlm.processing import Processing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's processor that cuts up to 12 tiles, as published ones do."""
    source = make_tiny_checkpoint("internvl", tmp_path_factory.mktemp("source"))
    folder = tmp_path_factory.mktemp("internvl")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_patches": 12}))
    return folder


@pytest.fixture(scope="module")
def processing(folder: Path) -> Processing:
    return Processing.from_dir(folder)


SIDES = st.one_of(st.integers(1, 60), st.integers(1, 3000))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(height=SIDES, width=SIDES)
def test_the_number_of_tokens_is_the_stock_one(processing: Processing, height: int, width: int) -> None:
    num_views = processing.image_processor.get_number_of_image_patches(height, width, {"crop_to_patches": True})
    # An image whose best grid is a single tile has no thumbnail.
    assert processing.num_image_tokens(height, width) == 4 * num_views
    assert processing.target_size(height, width) == (height, width)


@pytest.mark.parametrize("size", [(56, 56), (40, 300), (301, 75), (97, 130), (2, 5), (700, 500)])
def test_views_are_the_stock_ones(processing: Processing, folder: Path, size: tuple[int, int]) -> None:
    facts = TINY["internvl"]
    image = Image.fromarray(tiny_image(*size))  # not an array: the stock processor would guess where its channels are
    prepared = processing.resize_image(image, processing.target_size(*size))
    ours = processing.pixel_inputs([prepared])["pixel_values"]
    stock = stock_pixels(facts, facts.stock_processor(folder), [[image]])["pixel_values"]
    assert torch.equal(ours, torch.as_tensor(stock))


def test_limits_bound_what_is_stored(processing: Processing) -> None:
    assert processing.target_size(1000, 1000, max_pixels=250_000) == (500, 500)
    assert processing.target_size(10, 20, min_pixels=800) == (20, 40)


def test_settings_that_no_file_has(processing: Processing) -> None:
    parts = MediaParts(processing.image_processor, {}, lambda token: 0)
    assert FAMILIES["internvl"].image_layout(parts, 56, 56)[1].count == 256
    assert patches_per_token({}) == 4
    assert patches_per_token({"downsample_ratio": 0.25}) == 16
