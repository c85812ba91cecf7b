import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import TINY_FAMILIES
from tests.support.tiny_runs import batch_of
from vlm.config import LoraConfig
from vlm.errors import LoraError
from vlm.lora.attach import attached
from vlm.lora.build import build_adapter
from vlm.lora.full import full_parts, trained_whole
from vlm.lora.peft_model import WEIGHTS_FILE, adapter_parameters, load_tensors, save_tensors

ALL = LoraConfig(full_finetuning=("vision", "projector", "language"))


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def make_trained(run: Any, folder: Path, lora: LoraConfig = ALL) -> Path:
    """The artifact of full fine-tuning, as if trained."""
    build_adapter(run.loaded, lora, folder)
    generator = torch.Generator().manual_seed(0)
    with attached(run.loaded, folder, trainable=True) as model:
        for parameter in adapter_parameters(model).values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        save_tensors(model, folder / WEIGHTS_FILE)
    return folder


@pytest.mark.parametrize("model_type", TINY_FAMILIES)
def test_the_parts_cover_the_model_and_do_not_overlap(tiny_run: Callable, model_type: str) -> None:
    run = tiny_run(model_type)
    every = set(dict(run.loaded.model.named_parameters()))
    parts = [set(trained_whole(run.loaded.model, run.loaded.family, [part])) for part in ALL.full_finetuning]
    assert set(trained_whole(run.loaded.model, run.loaded.family, ALL.full_finetuning)) == every
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert all(parts)
    # What lies outside all parts (there is nothing here so far) is trained with the whole model only.
    assert {run.loaded.family.part_of(name) for name in every - set.union(*parts)} <= {None}


@pytest.mark.parametrize("model_type", TINY_FAMILIES)
@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_a_part_learns_alone_and_the_base_comes_back(
    tiny_run: Callable, tmp_path: Path, model_type: str, part: str
) -> None:
    run = tiny_run(model_type)
    base = run.loaded.model
    before = {name: (parameter.clone(), parameter.requires_grad) for name, parameter in base.named_parameters()}
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1])
    untrained = logits(base, batch)
    lora = LoraConfig(full_finetuning=(part,))
    summary = build_adapter(replace(run.loaded, digest="abc"), lora, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["targets.json"]
    assert full_parts(tmp_path) == (part,)
    with attached(run.loaded, tmp_path, trainable=True) as model:
        assert torch.equal(logits(model, batch), untrained)
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert learning == set(trained_whole(model, run.loaded.family, [part]))
        assert summary.num_targets == len(learning)
        assert summary.num_trainable_parameters == sum(
            parameter.numel() for parameter in model.parameters() if parameter.requires_grad
        )
    make_trained(run, tmp_path, lora)
    with attached(run.loaded, tmp_path) as model:
        trained = logits(model, batch)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        expected = load_file(tmp_path / WEIGHTS_FILE)
        assert set(expected) == learning
        assert all(torch.equal(dict(model.named_parameters())[name], expected[name]) for name in expected)
    assert (trained - untrained).abs().max() > 0.01
    assert torch.equal(logits(base, batch), untrained)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name][0]), name
        assert parameter.requires_grad == before[name][1]
    assert not hasattr(base, "trained_whole_parameters")


# Two that copy image features into the embeddings, which takes one type: one casts them, the other one does not.
@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
def test_parts_in_float32_learn_over_a_bfloat16_base(tiny_run: Callable, tmp_path: Path, model_type: str) -> None:
    """As on a GPU: one part's weights in float32, all others in bfloat16, under autocast."""
    run = tiny_run(model_type)
    low = replace(run.loaded, model=copy.deepcopy(run.loaded.model).bfloat16(), dtype="bfloat16")
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1])
    with torch.no_grad():
        expected = run.loaded.model(**batch).loss.item()
    for part in ("vision", "language"):
        build_adapter(low, LoraConfig(full_finetuning=(part,)), tmp_path / part)
        with attached(low, tmp_path / part, trainable=True) as model:
            model.train()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            learning = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            model.eval()
        assert learning == {torch.float32}
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert sum(gradient.norm() for gradient in gradients) > 0
        # bfloat16 has 8 bits: each of a dozen layers rounds by up to 2^-9.
        assert loss.item() == pytest.approx(expected, rel=1e-2)


def test_the_same_settings_give_the_same_bytes(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_vl")
    for name, parts in (("first", ("vision", "language")), ("second", ("language", "vision"))):
        build_adapter(replace(run.loaded, digest="abc"), LoraConfig(full_finetuning=parts), tmp_path / name)
    texts = [(tmp_path / name / "targets.json").read_bytes() for name in ("first", "second")]
    assert texts[0] == texts[1]
    content = json.loads(texts[0])
    assert content["full_finetuning"] == ["language", "vision"]
    assert set(content["num_targets_by_part"]) == {"head", "language", "vision"}


@pytest.mark.parametrize("how", ["lacks", "no place", "in shape"])
def test_weights_that_do_not_fit_exactly_are_refused(tiny_run: Callable, tmp_path: Path, how: str) -> None:
    run = tiny_run("qwen2_5_vl")
    make_trained(run, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    key = sorted(tensors)[0]
    if how == "lacks":
        del tensors[key]
    elif how == "no place":
        tensors["elsewhere.weight"] = torch.zeros(2)
    else:
        tensors[key] = torch.zeros(1)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    before = {name: parameter.clone() for name, parameter in run.loaded.model.named_parameters()}
    with pytest.raises(LoraError, match=how), attached(run.loaded, tmp_path):
        pass
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.loaded.model.named_parameters())


def test_what_cannot_be(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    build_adapter(replace(run.loaded, digest="a" * 64), ALL, tmp_path / "initial")
    with pytest.raises(LoraError, match="nothing has been trained yet"), attached(run.loaded, tmp_path / "initial"):
        pass
    with pytest.raises(LoraError, match=r"set model\.quantization to 'none'"):
        build_adapter(tiny_run("qwen2_5_vl", "nf4").loaded, ALL, tmp_path / "quantised")
    other = make_trained(tiny_run("qwen2_vl"), tmp_path / "other")
    with attached(run.loaded, tmp_path / "initial", trainable=True) as model:  # noqa: SIM117, only the load must fail
        with pytest.raises(LoraError, match="no place in the model"):
            load_tensors(model, other / WEIGHTS_FILE)
