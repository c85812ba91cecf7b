"""Idefics3 and SmolVLM: tiles, limits and the text around them against the stock processor; what the model infers itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.tiny_idefics3 import LABELS, TILE_SIZE
from tests.support.tiny_models import TINY, make_tiny_checkpoint, tiny_conversation, tiny_image
from vlm.errors import ModelError
from vlm.families import Run
from vlm.processing import Processing

RELAXED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture], "derandomize": True}
SIDES = st.one_of(st.integers(1, 400), st.sampled_from([TILE_SIZE, 2 * TILE_SIZE, 3 * TILE_SIZE, 5 * TILE_SIZE]))


@dataclass(frozen=True)
class Pair:
    folder: Path
    ours: Processing
    stock: Any


@pytest.fixture(scope="module", params=["idefics3", "smolvlm"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = make_tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    return Pair(folder, Processing.from_dir(folder), TINY[request.param].stock_processor(folder))


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint("smolvlm", tmp_path_factory.mktemp("smolvlm"))


def changed(folder: Path, copy: Path, **image_settings: Any) -> Processing:
    """A processor with other settings for images."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **image_settings}))
    return Processing.from_dir(copy)


SETTINGS: dict[str, dict[str, Any]] = {
    "as published, four tiles a side": {"size": {"longest_edge": 4 * TILE_SIZE}},
    "an edge between whole tiles": {"size": {"longest_edge": 3 * TILE_SIZE - 7}},
    "an edge below one tile": {"size": {"longest_edge": TILE_SIZE - 3}},
    "own size": {"do_resize": False},
    "whole images only": {"do_image_splitting": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_prepared_images_give_the_stock_tiles_and_text(smolvlm: Path, tmp_path: Path, name: str) -> None:
    ours = changed(smolvlm, tmp_path, **SETTINGS[name])
    stock = type(ours.image_processor).from_pretrained(tmp_path)

    @settings(max_examples=60, **RELAXED)
    @given(height=SIDES, width=SIDES)
    @example(height=1, width=300)
    @example(height=300, width=1)
    @example(height=2 * TILE_SIZE, width=TILE_SIZE)
    def check(height: int, width: int) -> None:
        image = Image.fromarray(tiny_image(height, width))
        size = ours.target_size(height, width)
        expected = stock([[image]], return_tensors="pt", return_row_col_info=True)
        rows, columns = expected["rows"][0][0], expected["cols"][0][0]
        prepared = ours.resize_image(image, size)
        assert prepared.shape == (*size, 3)
        assert torch.equal(ours.pixel_inputs([[prepared]])["pixel_values"], expected["pixel_values"])
        layout = ours.family.image_layout(ours._parts, *size)
        assert [piece for piece in layout if piece == Run("<image>", 4)] == [Run("<image>", 4)] * (rows * columns + 1)
        # A row's line break; one more stands before the global image.
        assert layout.count("\n") == (rows + 1 if rows else 0)
        # What is stored is no larger than it has to be, and is left alone when it comes by again.
        tiles = (max(rows, 1) * TILE_SIZE, max(columns, 1) * TILE_SIZE)
        assert size == tiles or (size == (height, width) and height * width < tiles[0] * tiles[1])
        assert ours.target_size(*size) == size or name == "own size"

    check()


@settings(max_examples=80, **RELAXED)
@given(height=SIDES, width=SIDES, limit=st.integers(1, 30 * TILE_SIZE**2))
def test_a_limit_on_the_area_is_a_shorter_longest_edge(
    smolvlm: Path, tmp_path_factory: pytest.TempPathFactory, height: int, width: int, limit: int
) -> None:
    ours = wide(smolvlm, tmp_path_factory)
    image = Image.fromarray(tiny_image(height, width))
    size = ours.target_size(height, width, max_pixels=limit)
    given = ours.pixel_inputs([[ours.resize_image(image, size)]])["pixel_values"]
    fitting = None
    for num_tiles in range(4, 0, -1):
        stock = ours.image_processor(
            [[image]], size={"longest_edge": num_tiles * TILE_SIZE}, return_tensors="pt", return_row_col_info=True
        )
        area = max(stock["rows"][0][0], 1) * max(stock["cols"][0][0], 1) * TILE_SIZE**2
        if area <= limit or num_tiles == 1:
            fitting = stock["pixel_values"]
            break
    assert torch.equal(given, fitting)
    assert ours.target_size(height, width, limit, limit) == size


_wide: dict[Path, Processing] = {}


def wide(folder: Path, factory: pytest.TempPathFactory) -> Processing:
    """At most 4 x 4 tiles; made once."""
    if folder not in _wide:
        _wide[folder] = changed(folder, factory.mktemp("wide"), size={"longest_edge": 4 * TILE_SIZE})
    return _wide[folder]


def test_no_side_is_longer_than_4096_pixels(smolvlm: Path, tmp_path: Path) -> None:
    ours = changed(smolvlm, tmp_path, size={"longest_edge": 5000}, max_image_size={"longest_edge": 512})
    image = Image.fromarray(tiny_image(1000, 10))
    stock = ours.image_processor([[image]], return_tensors="pt", return_row_col_info=True)
    assert (stock["rows"], stock["cols"]) == ([[8]], [[1]])
    assert ours.target_size(1000, 10) == (1000, 10)
    given = ours.pixel_inputs([[np.asarray(image)]])["pixel_values"]
    assert torch.equal(given, stock["pixel_values"])
    # The limit leaves out what would not change the canvas.
    assert ours.target_size(1000, 10, max_pixels=4096 * 512) == (1000, 10)
    assert ours.target_size(1000, 10, max_pixels=4095 * 512) == (3584, 512)


def test_labels_are_tokens_where_the_tokenizer_has_them(pair: Pair) -> None:
    messages, images = tiny_conversation("a", ((84, 112),))
    encoded = pair.ours.encode(messages, [image.shape[:2] for image in images])
    written = pair.ours.tokenizer.decode(encoded.input_ids)
    tile = "<image>" * 4
    around = "<fake_token_around_image>"
    assert (
        f"{around}<row_1_col_1>{tile}{around}<row_1_col_2>{tile}\n{around}<row_2_col_1>{tile}{around}<row_2_col_2>{tile}\n\n"
        f"{around}<global-img>{tile}{around}"
    ) in written
    tokens = pair.ours.tokenizer.convert_ids_to_tokens(encoded.input_ids)
    has_labels = pair.ours.family.model_type == "smolvlm"
    assert [token for token in tokens if token in LABELS] == (
        [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)] if has_labels else []
    )
    # Typed by a person, a label stays text in both.
    typed = pair.ours.encode([{"role": "user", "content": [{"type": "text", "text": "<row_1_col_1>"}]}], [])
    assert not set(LABELS).intersection(pair.ours.tokenizer.convert_ids_to_tokens(typed.input_ids))
    assert "<row_1_col_1>" in pair.ours.tokenizer.decode(typed.input_ids)


@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
def test_the_model_needs_no_mask_of_pixels(model_type: str, tmp_path: Path) -> None:
    """The stock processor gives one that is 1 in all tiles and 0 in padding, which the model drops by its zeros."""
    import transformers

    from vlm.families import FAMILIES

    folder = make_tiny_checkpoint(model_type, tmp_path)
    ours = Processing.from_dir(folder)
    model = getattr(transformers, FAMILIES[model_type].model_class).from_pretrained(folder).eval()
    rows = [tiny_conversation("a", sizes, seed) for seed, sizes in enumerate([((56, 84),), ((56, 56), (84, 28)), ()])]
    encoded = [ours.encode(messages, [image.shape[:2] for image in images]).input_ids for messages, images in rows]
    ids = torch.full((3, max(map(len, encoded))), ours.pad_token_id)
    for row, row_ids in enumerate(encoded):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in encoded])).long()
    images = [images for _, images in rows]
    stock = ours.image_processor(images, return_tensors="pt")
    pixels = ours.pixel_inputs(images)
    assert torch.equal(pixels["pixel_values"], stock["pixel_values"])
    real = (stock["pixel_values"] != 0).any(2)
    assert torch.equal(stock["pixel_attention_mask"].bool(), real)
    assert not real[2].any()
    with torch.no_grad():
        with_mask = model(input_ids=ids, attention_mask=mask, **stock).logits
        without = model(input_ids=ids, attention_mask=mask, **pixels).logits
    assert torch.equal(with_mask, without)


def test_a_size_without_a_longest_edge_is_refused(smolvlm: Path, tmp_path: Path) -> None:
    ours = changed(smolvlm, tmp_path, size={"height": 80, "width": 80})
    with pytest.raises(ModelError, match=r"size \{'height': 80, 'width': 80\}.*\"longest_edge\": pixels"):
        ours.target_size(100, 100)
