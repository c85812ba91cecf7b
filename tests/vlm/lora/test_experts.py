"""Routed experts: 3-D parameters that are no modules, reached through peft's `target_parameters`."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_models import TINY
from tests.support.tiny_runs import batch_of
from tests.vlm.lora.test_build_and_attach import fill, logits
from vlm.config import LoraConfig
from vlm.errors import LoraError
from vlm.lora.attach import attach_adapter, attached, detach_adapter
from vlm.lora.build import build_adapter
from vlm.lora.targets import EXPERTS_PATTERN, select

FAMILIES = [model_type for model_type, facts in TINY.items() if facts.language_experts]
EXPERTS = "model.language_model.layers.1.mlp.experts"


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(("setting", "value"), [("dropout", 0.1), ("use_dora", True)])
def test_what_experts_cannot_have_is_refused_with_a_remedy_that_works(
    tiny_run: Callable, model_type: str, setting: str, value: Any
) -> None:
    run = tiny_run(model_type)
    with pytest.raises(
        LoraError, match=rf"lora\.{setting} cannot be had for routed experts .*exclude_modules"
    ) as raised:
        select(run.loaded.model, run.loaded.family, LoraConfig(**{setting: value}))
    assert repr(EXPERTS_PATTERN) in str(raised.value)
    lora = LoraConfig(**{setting: value}, exclude_modules=(EXPERTS_PATTERN,))
    selection = select(run.loaded.model, run.loaded.family, lora)
    assert selection.parameters == ()
    assert any("shared_experts" in name for name in selection.targets)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_by_name_and_rank(tiny_run: Callable, tmp_path: Path, model_type: str) -> None:
    run = tiny_run(model_type)
    lora = LoraConfig(target_modules=("q_proj", "experts.down_proj"), rank=4, rank_pattern={"experts.down_proj": 2})
    selection = select(run.loaded.model, run.loaded.family, lora)
    assert selection.parameters == (f"{EXPERTS}.down_proj",)
    assert selection.ranks[f"{EXPERTS}.down_proj"] == 2
    build_adapter(run.loaded, lora, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"{EXPERTS}.down_proj"]
    targets = {target["name"]: target for target in json.loads((tmp_path / "targets.json").read_text())["targets"]}
    assert targets[f"{EXPERTS}.down_proj"]["num_experts"] == 4
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = [tuple(tensor.shape) for key, tensor in tensors.items() if ".experts.lora_A" in key]
    assert shapes == [(2 * 4, 64)]
    with pytest.raises(LoraError, match=r"'experts\.dwon_proj', which matches no layer"):
        select(run.loaded.model, run.loaded.family, LoraConfig(target_modules=("experts.dwon_proj",)))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_update_of_an_expert_against_a_slow_reference(
    tiny_run: Callable, tmp_path: Path, model_type: str, use_rslora: bool
) -> None:
    """Expert by expert: W + s B A, with each expert's own A and B, read from the file."""
    from vlm.export.factors import read_adapter

    run = tiny_run(model_type)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1])
    lora = LoraConfig(target_modules=(EXPERTS_PATTERN,), rank=3, alpha=5, use_rslora=use_rslora)
    build_adapter(run.loaded, lora, tmp_path)
    fill(tmp_path)
    with attached(run.loaded, tmp_path) as model:
        expected = logits(model, batch)
    base = logits(run.loaded.model, batch)
    targets = json.loads((tmp_path / "targets.json").read_text())["targets"]
    factors, _ = read_adapter(tmp_path, targets)
    experts = run.loaded.model.get_submodule(EXPERTS)
    originals = {name: getattr(experts, name).data for name in ("gate_up_proj", "down_proj")}
    try:
        for name, original in originals.items():
            update = factors[f"{EXPERTS}.{name}"]
            changed = original.clone()
            for expert in range(4):
                changed[expert] += 5 / (3**0.5 if use_rslora else 3) * update.b[expert] @ update.a[expert]
            getattr(experts, name).data = changed
        found = logits(run.loaded.model, batch)
    finally:
        for name, original in originals.items():
            getattr(experts, name).data = original
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (found - base).abs().max() > 0.01


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_pass_does_not_swap_the_names_of_the_next_adapter(
    tiny_run: Callable, tmp_path: Path, model_type: str
) -> None:
    """With one of the two adapted, every pass moves it behind the other, and peft names tensors by that order."""
    run = tiny_run(model_type)
    experts = run.loaded.model.get_submodule(EXPERTS)
    order = list(experts._parameters)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [1])
    build_adapter(run.loaded, LoraConfig(rank=2), tmp_path / "before")
    fill(tmp_path / "before")
    with attached(run.loaded, tmp_path / "before") as model:
        expected = logits(model, batch)
    build_adapter(run.loaded, LoraConfig(rank=2, target_modules=(rf"{EXPERTS}.{order[0]}",)), tmp_path / "one")
    with attached(run.loaded, tmp_path / "one") as model:
        logits(model, batch)
        assert list(experts._parameters) != order, "peft does not swap them any more: this test can go"
    assert list(experts._parameters) == order
    with attached(run.loaded, tmp_path / "before") as model:
        assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_that_peft_wrote_is_read_by_us_and_ours_by_peft(
    tiny_run: Callable, tmp_path: Path, model_type: str
) -> None:
    """Peft itself cannot read back what it writes for these models: it warns, and goes on with random matrices."""
    import peft

    run = tiny_run(model_type)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1])
    base = logits(run.loaded.model, batch)
    build_adapter(run.loaded, LoraConfig(rank=4), tmp_path / "ours")
    fill(tmp_path / "ours")
    model = attach_adapter(run.loaded, tmp_path / "ours", trainable=False)
    try:
        expected = logits(model, batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft's, about the base's name
            model.save_pretrained(str(tmp_path / "theirs"))
    finally:
        detach_adapter(model)
    keys = [set(load_file(tmp_path / name / "adapter_model.safetensors")) for name in ("ours", "theirs")]
    assert not any("language_model" in key for key in keys[0])
    assert all(
        "language_model" in key for key in keys[1] if ".layers." in key and "vision" not in key and "sam" not in key
    )
    with attached(run.loaded, tmp_path / "theirs") as model:
        assert torch.equal(logits(model, batch), expected)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        broken = peft.PeftModel.from_pretrained(run.loaded.model, str(tmp_path / "theirs")).eval()
    try:
        # B stays 0, so the adapter has no effect in the language model: nothing says so but the warning.
        assert not torch.equal(logits(broken, batch), expected)
    finally:
        detach_adapter(broken)
    plain = peft.PeftModel.from_pretrained(run.loaded.model, str(tmp_path / "ours")).eval()
    try:
        assert torch.equal(logits(plain, batch), expected)
    finally:
        detach_adapter(plain)
    assert torch.equal(logits(run.loaded.model, batch), base)
