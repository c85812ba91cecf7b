"""Gemma 3: one size for all images, whose tokens see each other in both directions, in training as in inference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_models import TINY, tiny_image
from tests.support.tiny_runs import batch_of
from vlm.families import FAMILIES, MediaParts
from vlm.families.gemma3_media import patches_per_token
from vlm.processing import Processing


@pytest.fixture(scope="module")
def run(tiny_run: Callable) -> Any:
    return tiny_run("gemma3")


def logits(run: Any, batch: dict[str, Any], **changed: Any) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"} | changed
    with torch.no_grad():
        return run.loaded.model(**inputs, use_cache=False).logits


def reach(run: Any, batch: dict[str, Any], image: int, token: int) -> torch.Tensor:
    """How far the logits at each position change with one image token's embedding. Shape [sequence]."""

    def change(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[image, token] += 1
        return output

    before = logits(run, batch)
    hook = run.loaded.model.model.multi_modal_projector.register_forward_hook(change)
    try:
        return (logits(run, batch) - before)[0].abs().amax(-1)
    finally:
        hook.remove()


def test_the_tokens_of_one_image_see_each_other(run: Any) -> None:
    batch = batch_of(run.loaded, run.dataset_dir, "train", [1])  # two images of four tokens
    positions = batch["token_type_ids"][0].nonzero()[:, 0].tolist()
    assert len(positions) == 8
    last_of_first, last_of_second = reach(run, batch, 0, 3), reach(run, batch, 1, 3)
    for changed, start in ((last_of_first, positions[0]), (last_of_second, positions[4])):
        assert changed[:start].max() == 0
        assert changed[start : start + 4].min() > 1e-3
        assert changed[-1] > 0
    causal = batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])}
    changed = reach(run, causal, 0, 3)
    assert changed[: positions[3]].max() == 0
    assert changed[positions[3]] > 1e-3


def test_training_mode_sees_what_inference_sees(run: Any) -> None:
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1, 2])
    expected = logits(run, batch)
    run.loaded.model.train()
    try:
        assert torch.equal(logits(run, batch), expected)
    finally:
        run.loaded.model.eval()


def test_token_types_without_images_change_nothing(run: Any) -> None:
    batch = batch_of(run.loaded, run.dataset_dir, "train", [2])
    assert not batch["token_type_ids"].any()
    # Two ways to the same mask: float32 sums may run in another order.
    torch.testing.assert_close(logits(run, batch), logits(run, batch, token_type_ids=None), atol=1e-5, rtol=1e-5)


def test_elongated_images_get_no_further_crops(run: Any, tmp_path: Path) -> None:
    """The stock processor switches them off whatever the image processor's file says; ids and pixels agree with it."""
    source = run.checkpoint_dir / "processor"
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "preprocessor_config.json"
    crops = {
        "do_pan_and_scan": True,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_crop_size": 16,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | crops))
    shutil.copyfile(run.checkpoint_dir / "model" / "config.json", tmp_path / "config.json")
    image = tiny_image(40, 200)
    messages = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    stock = TINY["gemma3"].stock_processor(tmp_path)
    expected = stock.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert expected["pixel_values"].shape == (1, 3, 56, 56)
    ids = Processing.from_dir(tmp_path).encode([{"role": "user", "content": [{"type": "image"}]}], [(56, 56)]).input_ids
    assert ids == expected["input_ids"][0].tolist()


def test_one_size(run: Any) -> None:
    for limits in ({}, {"max_pixels": 100}, {"min_pixels": 10**6}):
        assert run.loaded.processing.target_size(40, 200, **limits) == (56, 56)


def test_settings_that_no_file_has(run: Any) -> None:
    parts = MediaParts(run.loaded.processing.image_processor, {}, lambda token: 0)
    assert FAMILIES["gemma3"].image_layout(parts, 896, 896)[1].count == 256
    assert patches_per_token({"vision_config": {"image_size": 896, "patch_size": 14}}) == 16
