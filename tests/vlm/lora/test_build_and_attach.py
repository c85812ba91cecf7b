import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import TINY
from tests.support.tiny_runs import batch_of
from vlm.config import GenerationConfig, LoraConfig
from vlm.errors import LoraError
from vlm.families import FAMILIES
from vlm.generate import generate_predictions
from vlm.lora.attach import attach_adapter, attached, detach_adapter
from vlm.lora.build import build_adapter
from vlm.lora.peft_model import adapter_parameters

RICH = LoraConfig(
    rank=4,
    rank_pattern={"v_proj": 2},
    use_dora=True,
    use_rslora=True,
    finetune_projector=True,
    modules_to_save=("lm_head",),
)


def fill(adapter_dir: Path, seed: int = 0) -> None:
    """Puts noise into B (zero at first), so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor.normal_(0, 0.2, generator=generator)
        elif "lora_" not in key or "magnitude" in key:
            tensor.mul_(1.1)
    save_file(tensors, adapter_dir / "adapter_model.safetensors", metadata={"format": "pt"})


def logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_same_configuration_gives_the_same_bytes_and_leaves_the_model_alone(
    tiny_run: Callable, tmp_path: Path, model_type: str
) -> None:
    run = tiny_run(model_type)
    before = {name: parameter.clone() for name, parameter in run.loaded.model.named_parameters()}
    modules = [(name, id(module)) for name, module in run.loaded.model.named_modules()]
    loaded = replace(run.loaded, digest="abc")
    for name in ("first", "second"):
        torch.manual_seed(len(name))  # the caller's random state must not matter
        summary = build_adapter(loaded, TINY[model_type].without_experts(RICH), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "targets.json"]
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
        assert str(tmp_path).encode() not in (tmp_path / "first" / file).read_bytes()
    assert modules == [(name, id(module)) for name, module in run.loaded.model.named_modules()]
    for name, parameter in run.loaded.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert summary.num_targets_by_part["projector"] == len(TINY[model_type].projector)
    assert summary.num_targets == sum(summary.num_targets_by_part.values())
    tensors = load_file(tmp_path / "first" / "adapter_model.safetensors")
    assert summary.num_trainable_parameters == sum(tensor.numel() for tensor in tensors.values())


def test_the_seed_and_the_module_decide_the_weights_and_nothing_else(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    key = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors = {}
    for name, settings in {
        "all": {"rank": 4},
        "one": {"rank": 4, "target_modules": ("q_proj",)},
        "seed": {"rank": 4, "target_modules": ("q_proj",), "seed": 1},
    }.items():
        build_adapter(run.loaded, LoraConfig(**settings), tmp_path / name)
        tensors[name] = load_file(tmp_path / name / "adapter_model.safetensors")[key]
    assert torch.equal(tensors["all"], tensors["one"])
    assert not torch.equal(tensors["all"], tensors["seed"])
    assert tensors["all"].abs().max() <= 1 / 8  # 1 / sqrt(64 inputs)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_a_filled_one_comes_back_exactly(
    tiny_run: Callable, tmp_path: Path, model_type: str
) -> None:
    run = tiny_run(model_type)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1])
    base = logits(run.loaded.model, batch)
    build_adapter(run.loaded, TINY[model_type].without_experts(RICH), tmp_path)
    with attached(run.loaded, tmp_path) as model:
        # DoRA divides by the norm it multiplies with, which rounds.
        torch.testing.assert_close(logits(model, batch), base, atol=1e-5, rtol=1e-5)
    fill(tmp_path)
    with attached(run.loaded, tmp_path) as model:
        live = {key: parameter.clone() for key, parameter in adapter_parameters(model).items()}
        filled = logits(model, batch)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert set(live) == set(stored)
    assert all(torch.equal(live[key], stored[key]) for key in stored)
    assert (filled - base).abs().max() > 0.01
    assert torch.equal(logits(run.loaded.model, batch), base)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("lora", [LoraConfig(rank=4), RICH], ids=["plain", "rich"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_plain_peft_loads_the_adapter(tiny_run: Callable, tmp_path: Path, model_type: str, lora: LoraConfig) -> None:
    import peft

    run = tiny_run(model_type)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1])
    build_adapter(run.loaded, lora if lora is not RICH else TINY[model_type].without_experts(lora), tmp_path)
    fill(tmp_path)
    with attached(run.loaded, tmp_path) as model:
        expected = logits(model, batch)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "source"
    plain = peft.PeftModel.from_pretrained(run.loaded.model, str(tmp_path)).eval()
    try:
        assert torch.equal(logits(plain, batch), expected)
    finally:
        detach_adapter(plain)


def test_whole_modules_are_trained_in_float32(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_vl")
    build_adapter(run.loaded, RICH, tmp_path)
    model = attach_adapter(run.loaded, tmp_path, trainable=True)
    try:
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert len(learning) == len(adapter_parameters(model))
        assert all(parameter.dtype == torch.float32 for parameter in adapter_parameters(model).values())
    finally:
        detach_adapter(model)


def broken(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    key = next(iter(sorted(tensors)))
    if how == "lacks":
        del tensors[key]
    elif how == "no place":
        tensors["base_model.model.elsewhere.lora_A.weight"] = torch.zeros(2, 2)
    else:
        tensors[key] = torch.zeros(1, 1)
    return tensors


@pytest.mark.parametrize("how", ["lacks", "no place", "in shape"])
def test_an_adapter_that_does_not_fit_exactly_is_refused(tiny_run: Callable, tmp_path: Path, how: str) -> None:
    run = tiny_run("qwen2_5_vl")
    build_adapter(run.loaded, LoraConfig(rank=2), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(broken(load_file(file), how), file)
    modules = [name for name, _ in run.loaded.model.named_modules()]
    with pytest.raises(LoraError, match=how):
        attach_adapter(run.loaded, tmp_path, trainable=False)
    assert modules == [name for name, _ in run.loaded.model.named_modules()]


def test_an_adapter_of_another_base_is_refused(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    build_adapter(replace(run.loaded, digest="a" * 64), LoraConfig(rank=2), tmp_path)
    same_shapes = replace(run.loaded, digest="b" * 64)
    with pytest.raises(LoraError, match="was made for base checkpoint aaaaaaaaaaaa but this is bbbbbbbbbbbb"):
        attach_adapter(same_shapes, tmp_path, trainable=False)
    with pytest.raises(LoraError, match="was made for base checkpoint aaaaaaaaaaaa"):
        generate_predictions(same_shapes, run.dataset_dir, GenerationConfig(), tmp_path / "out", adapter_dir=tmp_path)
    for loaded in (run.loaded, replace(run.loaded, digest="a" * 64)):  # nothing to compare, and the right one
        detach_adapter(attach_adapter(loaded, tmp_path, trainable=False))
    other = tiny_run("qwen2_vl")  # its vision tower has other modules
    with pytest.raises(LoraError, match="which the base model does not have"):
        attach_adapter(other.loaded, tmp_path, trainable=False)
    with pytest.raises(LoraError, match=r"has no adapter_config\.json"):
        attach_adapter(run.loaded, tmp_path / "nowhere", trainable=False)


def test_a_quantised_module_cannot_be_trained_whole(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl", "nf4")
    lora = LoraConfig(target_modules=("q_proj",), modules_to_save=("layers.0.mlp.down_proj",))
    with pytest.raises(LoraError, match="keep_unquantized"):
        build_adapter(run.loaded, lora, tmp_path)


def test_dora_over_int8_needs_a_gpu(tiny_run: Callable, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="use 'nf4' or 'none', or a GPU"):
        build_adapter(tiny_run("qwen2_5_vl", "int8").loaded, LoraConfig(use_dora=True), tmp_path)
