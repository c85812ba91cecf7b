"""Llama 3.2 Vision: tiles and masks against the stock processor, and rows that do not disturb each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.tiny_models import TINY, make_tiny_checkpoint, tiny_image
from tests.support.tiny_runs import batch_of
from vlm.families import FAMILIES
from vlm.families.family import MediaParts
from vlm.processing import Processing
from vlm.training.collator import VisionDataCollator

TILE = 56
SIDES = st.one_of(st.integers(1, 3 * TILE), st.integers(1, 2000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint("mllama", tmp_path_factory.mktemp("mllama"))


@pytest.fixture(scope="module")
def processing(folder: Path) -> Processing:
    return Processing.from_dir(folder)


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    return TINY["mllama"].stock_processor(folder)


def gradient_image(height: int, width: int) -> np.ndarray:
    """Cheap to make at any size, and different at every place."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows % 251, columns % 241, (rows * 7 + columns * 3) % 239], axis=-1).astype(np.uint8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(height=SIDES, width=SIDES)
@example(height=4 * TILE, width=4 * TILE + 2)  # fits a canvas of 2 x 2 tiles at a scale of a half, or nearly
@example(height=448, width=225)  # 112 x 56.25 on a canvas of 112 x 112: rounded down it would fit 112 x 56
@example(height=225, width=448)
@example(height=1, width=2000)
@example(height=TILE, width=TILE)
def test_any_image_gives_the_stock_tensors(processing: Processing, stock: Any, height: int, width: int) -> None:
    image = Image.fromarray(gradient_image(height, width))
    expected = stock.image_processor([[image]], return_tensors="pt")
    size = processing.target_size(height, width)
    stored = processing.resize_image(image, size)
    assert stored.shape == (*size, 3)
    again = stock.image_processor([[Image.fromarray(stored)]], return_tensors="pt")
    for found in (processing.pixel_inputs([[stored]]), again):
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            assert torch.equal(found[name], expected[name]), name
    assert processing.target_size(*size) == size


def test_rounding_that_would_change_the_canvas_is_met_with_a_line_of_padding(processing: Processing) -> None:
    assert processing.target_size(448, 225) == (112, 57)
    stored = processing.resize_image(Image.fromarray(np.full((448, 225, 3), 9, np.uint8)), (112, 57))
    assert stored[:, :56].min() == 9
    assert stored[:, 56].max() == 0
    grey = processing.resize_image(Image.new("L", (225, 448), 9), (112, 57))
    assert np.array_equal(grey, stored)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(height=SIDES, width=SIDES, limit=st.integers(1, 10**6))
def test_limits(processing: Processing, height: int, width: int, limit: int) -> None:
    smaller = processing.target_size(height, width, max_pixels=limit)
    assert processing.target_size(*smaller) == smaller
    # Enlarged to a tile on the longer side, as the model needs it; the line of padding comes on top.
    assert smaller[0] * smaller[1] <= max(limit, TILE * TILE) + max(smaller)
    larger = processing.target_size(height, width, min_pixels=limit)
    assert processing.target_size(*larger) == larger
    assert max(larger) <= 4 * TILE


def test_an_image_shrunk_by_a_limit_can_be_stored(processing: Processing) -> None:
    image = gradient_image(300, 200)
    size = processing.target_size(300, 200, max_pixels=8000)
    assert 56 <= max(size) < 120
    assert processing.pixel_inputs([[processing.resize_image(Image.fromarray(image), size)]])["pixel_values"].any()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=4), min_size=1, max_size=3).filter(
        lambda rows: any(is_image for row in rows for is_image, _ in row)
    ),
    left=st.booleans(),
)
def test_the_cross_attention_mask_is_the_stock_one(
    processing: Processing, rows: list[list[tuple[bool, int]]], left: bool
) -> None:
    from transformers.models.mllama import processing_mllama

    image_id = processing.image_token_id
    sequences = [
        [1, *(id_ for is_image, words in row for id_ in ([image_id] if is_image else []) + [5] * words)] for row in rows
    ]
    images = [[tiny_image(56, 56 * (1 + number % 3)) for number in range(sum(kind for kind, _ in row))] for row in rows]
    length = max(map(len, sequences))
    pad = [[0] * (length - len(sequence)) for sequence in sequences]
    ids = [add + own if left else own + add for own, add in zip(sequences, pad, strict=True)]
    media = processing.pixel_inputs(images)
    found = processing.model_inputs(torch.tensor(ids), media)["cross_attention_mask"]
    expected = processing_mllama.convert_sparse_cross_attention_mask_to_dense(
        [processing_mllama.get_cross_attention_token_mask(row, image_id) for row in ids],
        num_tiles=[[1 + number % 3 for number in range(len(row))] for row in images],
        max_num_tiles=4,
        length=length,
    )
    assert torch.equal(found, torch.from_numpy(expected))


def test_text_alone_needs_no_tensors(processing: Processing) -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    assert processing.model_inputs(ids, processing.pixel_inputs([[], []])) == {}


def test_the_image_token_is_embedded_but_never_a_label(tiny_run: Callable) -> None:
    """Its id is one past the head's last output."""
    from vlm.data.prepared import PreparedDataset

    run = tiny_run("mllama")
    model, image_id = run.loaded.model, run.loaded.processing.image_token_id
    assert image_id == model.config.text_config.vocab_size == model.lm_head.out_features
    assert image_id < model.get_input_embeddings().num_embeddings
    rows = [PreparedDataset(run.dataset_dir, "train")[number] for number in (0, 1)]
    for train_on_prompts in (False, True):
        batch = VisionDataCollator(run.loaded.processing, train_on_prompts=train_on_prompts)(rows)
        assert (batch["input_ids"] == image_id).sum() == 3
        assert batch["labels"].max() < image_id


@pytest.fixture(scope="module")
def plain(tiny_run: Callable) -> Any:
    """The same model from transformers, without our hooks."""
    from transformers import MllamaForConditionalGeneration

    folder = tiny_run("mllama").checkpoint_dir / "model"
    return MllamaForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").eval()


def padded_left(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Moves the padding of a batch to the left, in everything that goes by positions."""
    shifts = (1 - batch["attention_mask"]).sum(1).tolist()
    by_position = ("input_ids", "attention_mask", "cross_attention_mask")
    moved = {
        name: torch.stack([row.roll(shift, 0) for row, shift in zip(batch[name], shifts, strict=True)])
        for name in by_position
    }
    return {**batch, **moved, "position_ids": (moved["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def own_logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits[mask]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2, 0], [1, 0], [2, 6]])  # one, two, none, one image; 6 has none
def test_rows_of_a_batch_give_what_stock_transformers_gives_for_each_alone(
    tiny_run: Callable, plain: Any, rows: Sequence[int], left: bool
) -> None:
    run = tiny_run("mllama")
    alone = torch.cat([own_logits(plain, batch_of(run.loaded, run.dataset_dir, "train", [row])) for row in rows])
    batch = batch_of(run.loaded, run.dataset_dir, "train", list(rows))
    mixed = "pixel_values" in batch
    if left and mixed:
        batch = padded_left(batch)
    # Padding changes the order of float32 sums only.
    torch.testing.assert_close(own_logits(run.loaded.model, batch), alone, atol=2e-5, rtol=1e-4)
    if mixed:
        assert (own_logits(plain, batch) - alone).abs().max() > 0.01, "transformers needs the hooks no more"


def test_images_reach_the_answer_and_gradients_the_first_vision_layer(tiny_run: Callable) -> None:
    """The gates of cross-attention are open in the tiny model; closed, as in a fresh one, both would be zero."""
    run = tiny_run("mllama")
    model = run.loaded.model
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0])
    changed = {**batch, "pixel_values": batch["pixel_values"].flip(-1)}
    assert (own_logits(model, batch)[-5:] - own_logits(model, changed)[-5:]).abs().max() > 0.01
    weight = model.model.vision_model.transformer.layers[0].self_attn.q_proj.weight
    learns = weight.requires_grad  # peft turns it off, and other tests share the model
    weight.requires_grad_(True)
    try:
        (gradient,) = torch.autograd.grad(model(**batch).loss, weight)
    finally:
        weight.requires_grad_(learns)
    assert gradient.abs().max() > 1e-6


def test_the_tower_holds_the_outputs_that_are_asked_for(tiny_run: Callable, plain: Any) -> None:
    run = tiny_run("mllama")
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0])
    given = {name: batch[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    towers = [model.model.vision_model for model in (run.loaded.model, plain)]
    wanted = {number % 2 for number in towers[0].intermediate_layers_indices}
    outputs: list[Any] = []
    hooks = [
        getattr(towers[0], name).register_forward_hook(lambda module, args, output: outputs.append(output))
        for name in ("transformer", "global_transformer")
    ]
    with torch.no_grad():
        found, expected = (tower(**given).last_hidden_state for tower in towers)
    for hook in hooks:
        hook.remove()
    # The same operations on the same numbers; the shape is made flat for the projector.
    assert torch.equal(found.flatten(), expected.flatten())
    local, whole = ([state is not None for state in output.hidden_states] for output in outputs)
    assert {number for number, kept in enumerate(local) if kept} == wanted
    assert not any(whole)


def test_positions_of_the_vision_tower(tiny_run: Callable) -> None:
    """Four tiles of 16 patches and a class token each, padded to a multiple of 8."""
    family = FAMILIES["mllama"]
    assert family.patches_per_token is not None
    assert family.patches_per_token(tiny_run("mllama").loaded.model.config.to_dict()) == 4 * 24
    assert family.patches_per_token({"vision_config": {"image_size": 560, "patch_size": 14}}) == 4 * 1608


def test_target_size_needs_no_torch() -> None:
    class Stub:
        size = {"height": 560, "width": 560}
        max_image_tiles = 4

    parts = MediaParts(Stub(), {}, lambda token: 0)
    assert FAMILIES["mllama"].target_size(parts, 3000, 2000, None, None) == (1120, 746)
