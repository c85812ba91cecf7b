"""Packs are what the core's collator makes of the same lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny_pretraining import SMALLEST
from vlm.config.pretrain import ArchitectureConfig, CurriculumConfig, PretrainConfig
from vlm.families.pixels import finished
from vlm.pretrain.batch import model_inputs, to_device
from vlm.pretrain.model import PROMPTS, new_model, pretrain_tokenizer, write_model
from vlm.pretrain.packs import PackMaker
from vlm.pretrain.schedule import difficulty, learning_rate
from vlm.pretrain.train import pack_of_step
from vlm.processing import Processing
from vlm.processing.files import read_json
from vlm.training.collator import IGNORED

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    write_model(new_model(ArchitectureConfig.model_validate(SMALLEST), 0), folder)
    return folder


@pytest.fixture(scope="module")
def pack(checkpoint: Path) -> dict[str, Any]:
    return PackMaker(checkpoint, CurriculumConfig(), 3000, 0)(7, 0.6)


def test_a_pack_is_full_but_not_over(pack: dict[str, Any]) -> None:
    positions = pack["input_ids"].size + len(pack["patches"])
    assert 2000 < positions <= 3000
    assert len(pack["patches"]) == pack["image_grid_thw"].prod(1).sum()


def test_a_pack_depends_on_seed_and_number(checkpoint: Path, pack: dict[str, Any]) -> None:
    same = PackMaker(checkpoint, CurriculumConfig(), 3000, 0)(7, 0.6)
    assert np.array_equal(same["patches"], pack["patches"])
    assert np.array_equal(same["input_ids"], pack["input_ids"])
    other = PackMaker(checkpoint, CurriculumConfig(), 3000, 0)(8, 0.6)
    assert not np.array_equal(other["input_ids"], pack["input_ids"])


def test_layout_is_that_of_the_core(checkpoint: Path, pack: dict[str, Any]) -> None:
    """Positions, boundaries and pixels against `packed_inputs` over the images, pasted together from the patches."""
    processing = Processing.from_dir(checkpoint)
    images, start = [], 0
    for _, rows, columns in pack["image_grid_thw"].tolist():
        squares = pack["patches"][start : start + rows * columns].reshape(rows // 2, columns // 2, 2, 2, 14, 14)
        grey = squares.transpose(0, 2, 4, 1, 3, 5).reshape(rows * 14, columns * 14)
        images.append([np.repeat(grey[..., None], 3, 2)])
        start += rows * columns
    ends = np.cumsum(pack["packed_row"]["lengths"])[:-1]
    samples = [torch.from_numpy(ids) for ids in np.split(pack["input_ids"][0], ends)]
    oracle = finished(processing.packed_inputs(samples, images, read_json(checkpoint / "config.json")))
    inputs = model_inputs(to_device(pack, CPU), None)
    assert torch.equal(inputs["position_ids"], oracle["position_ids"])
    assert torch.equal(inputs["image_grid_thw"], oracle["image_grid_thw"])
    # A look-up of 256 levels there, the same sum in float32 here: the last bit may differ.
    torch.testing.assert_close(inputs["pixel_values"], oracle["pixel_values"], atol=1e-6, rtol=1e-6)
    assert inputs["packed_row"]["lengths"] == oracle["packed_row"]["lengths"]
    assert torch.equal(inputs["packed_row"]["ends"], oracle["packed_row"]["ends"])
    for name, value in oracle["packed_row"]["tower"][0].items():
        made = inputs["packed_row"]["tower"][0][name]
        assert torch.equal(made, value) if isinstance(value, torch.Tensor) else made == value


def test_only_answers_carry_loss(checkpoint: Path, pack: dict[str, Any]) -> None:
    tokenizer = pretrain_tokenizer()
    ends = np.cumsum(pack["packed_row"]["lengths"])[:-1]
    for ids, labels in zip(np.split(pack["input_ids"][0], ends), np.split(pack["labels"][0], ends), strict=True):
        spoken = tokenizer.decode(ids[labels != IGNORED])
        whole = tokenizer.decode(ids)
        assert whole.endswith(f"<|im_start|>assistant\n{spoken}\n")
        assert spoken.endswith("<|im_end|>")
        assert any(f"{prompt}<|im_end|>" in whole for prompt in PROMPTS)


def test_variation_keeps_images_apart_and_in_range(pack: dict[str, Any]) -> None:
    tensors = to_device(pack, CPU)
    plain = model_inputs(tensors, None)["pixel_values"]
    first, again, other = (
        model_inputs(tensors, torch.Generator().manual_seed(seed))["pixel_values"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for varied in (first, other):
        # Black and white, normalised, are the ends of the range whatever the variation.
        assert varied.max() <= (1 - 0.40821073) / 0.26862954 + 1e-3
        assert varied.min() >= -0.48145466 / 0.26862954 - 1e-3
        # Within an image, what varies is one line: light stays light and dark dark, or all is turned around.
        start = 0
        for count in pack["image_grid_thw"].prod(1).tolist():
            before, after = plain[start : start + count].flatten(), varied[start : start + count].flatten()
            if before.std() > 0.6:  # strong enough that the grain, at most 0.22 in these units, cannot hide it
                assert abs(torch.corrcoef(torch.stack([before, after]))[0, 1]) > 0.8
            start += count


def test_prompts_are_short_and_answers_are_spelt() -> None:
    tokenizer = pretrain_tokenizer()
    assert len(tokenizer.encode(PROMPTS[0])) <= 8
    for text in ("4711 ÄÖÜ žluťoučký €3.50", "QWERTZ-9", "ﬁn\n“x”"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # Digits and capitals are bytes.
    assert len(tokenizer.encode("AB12CD90")) == 8


def test_every_pack_is_used_as_often_as_set() -> None:
    for uses in (1, 2, 3):
        packs = [pack_of_step(step, uses) for step in range(16 * uses * 4)]
        assert sorted(packs) == sorted(list(range(64)) * uses)
        last: dict[int, int] = {}
        for step, number in enumerate(packs):
            assert number not in last or step - last[number] >= 16
            last[number] = step


def test_schedule() -> None:
    config = PretrainConfig(num_steps=1000, warmup_steps=100, learning_rate=1e-3, final_rate=0.01)
    rates = [learning_rate(config, step, step / 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5, rel=1e-3)
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates[-1] == pytest.approx(1e-5, rel=0.01)
    assert rates[100:] == sorted(rates[100:], reverse=True)
    levels = [difficulty(config.curriculum, done / 100) for done in range(101)]
    assert (levels[0].longest, levels[-1].longest) == (5, 52)
    assert (levels[0].figures, levels[-1].figures) == (0.6, 0.0)
    assert levels[0].wear == pytest.approx(0.1)
    assert levels[-1].wear == pytest.approx(1.0)
    assert [level.longest for level in levels] == sorted(level.longest for level in levels)
