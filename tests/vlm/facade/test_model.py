import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vlm
from tests.support.tiny_models import TINY_FAMILIES
from tests.support.tiny_runs import batch_of
from vlm.config import LoraConfig
from vlm.errors import ConfigError, LoraError, ModelError
from vlm.lora.attach import attached
from vlm.lora.build import build_adapter
from vlm.lora.peft_model import adapter_parameters, load_tensors


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, vlm; assert 'FastVisionModel' in dir(vlm);"
        "assert not {'torch', 'transformers', 'peft', 'pydantic'} & set(sys.modules);"
        "vlm.FastVisionModel, vlm.process_vision_info, vlm.to_dataset;"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="FastLanguageModel"):
        _ = vlm.FastLanguageModel


def defaults(function: Any) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def test_names_and_defaults_are_those_of_the_notebooks() -> None:
    assert (
        defaults(vlm.FastVisionModel.from_pretrained).items()
        >= {
            "max_seq_length": 2048,
            "dtype": None,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "full_finetuning": False,
            "token": None,
            "use_gradient_checkpointing": "unsloth",
        }.items()
    )
    assert (
        defaults(vlm.FastVisionModel.get_peft_model).items()
        >= {
            "r": 16,
            "target_modules": None,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "bias": "none",
            "finetune_vision_layers": True,
            "finetune_language_layers": True,
            "finetune_attention_modules": True,
            "finetune_mlp_modules": True,
            "use_gradient_checkpointing": "unsloth",
            "random_state": 3407,
            "use_rslora": False,
            "modules_to_save": None,
        }.items()
    )


@pytest.mark.parametrize("model_type", TINY_FAMILIES)
def test_an_adapter_is_the_cores_own(load: Callable, tiny_run: Callable, tmp_path: Path, model_type: str) -> None:
    run = tiny_run(model_type)
    model, _ = load(model_type)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1])
    base = logits(model, batch)
    assert torch.equal(base, logits(run.loaded.model, batch))
    adapted = vlm.FastVisionModel.get_peft_model(
        model,
        finetune_vision_layers=False,
        r=4,
        lora_alpha=8,
        lora_dropout=0,
        bias="none",
        random_state=5,
        use_rslora=True,
        loftq_config=None,
        target_modules="all-linear",
        modules_to_save=["lm_head"],
        last_language_layers=1,
    )
    lora = LoraConfig(
        rank=4,
        alpha=8,
        seed=5,
        use_rslora=True,
        finetune_vision_layers=False,
        modules_to_save=("lm_head",),
        last_language_layers=1,
    )
    build_adapter(run.loaded, lora, tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    found = adapter_parameters(adapted)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key].data, expected[key]) for key in expected)
    learning = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(learning) == len(expected)
    for parameter in found.values():
        parameter.data.add_(0.01)
    moved = {key: parameter.data.clone() for key, parameter in found.items()}
    with attached(run.loaded, tmp_path) as model:
        for key, parameter in adapter_parameters(model).items():
            parameter.data.copy_(moved[key])
        assert torch.equal(logits(model, batch), logits(adapted, batch))


def test_the_quantised_checkpoint_is_made_once(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.loading import build

    first, _ = load("qwen2_vl", load_in_4bit=True)
    monkeypatch.setattr(build, "build_checkpoint", lambda *args, **kwargs: pytest.fail("built again"))
    second, _ = load("qwen2_vl", load_in_4bit=True)
    assert type(second.model.language_model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)


def test_eight_bit(load: Callable) -> None:
    model, _ = load("qwen2_vl", load_in_8bit=True, keep_unquantized=["vision"])
    assert type(model.model.language_model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    assert type(model.model.visual.blocks[0].attn.qkv) is torch.nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True, "load_in_4bit": True}, "exclude each other; turn off load_in_4bit"),
        ({"full_finetuning": True, "load_in_4bit": True}, "set load_in_4bit=False"),
        ({"trust_remote_code": True}, "trust_remote_code=True would have no effect"),
        ({"fast_inference": True}, "no second inference engine"),
        ({"max_seq_lenght": 5}, "Did you mean 'max_seq_length'"),
        ({"max_seq_length": 0}, "must be positive"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"device_map": "balanced"}, "device_map 'balanced' cannot be used"),
        ({"keep_unquantized": ["eyes"]}, r"keep_unquantized\.0 Input should be"),
        ({"use_gradient_checkpointing": "offload"}, "'offload' is unknown"),
    ],
)
def test_loading_refuses_what_has_no_effect(load: Callable, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("qwen2_vl", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "all"}, "bias='all' would have no effect"),
        ({"loftq_config": {"bits": 4}}, "loftq_config"),
        ({"layers_to_transform": [1]}, "give last_language_layers"),
        ({"lora_alpah": 4}, "Did you mean 'lora_alpha'"),
        ({"r": 0}, "rank Input should be greater"),
        ({"finetune_vision_layers": False, "finetune_language_layers": False}, "leave nothing to train"),
        ({"target_modules": ["q_porj"]}, "Did you mean 'q_proj'"),
        ({"last_vision_layers": 3}, "the model has 2 such layers"),
    ],
)
def test_adapting_refuses_what_has_no_effect(load: Callable, options: dict[str, Any], message: str) -> None:
    model, _ = load("qwen2_vl")
    with pytest.raises((ConfigError, LoraError), match=message):
        vlm.FastVisionModel.get_peft_model(model, **options)


def test_one_adapter_at_a_time(load: Callable) -> None:
    model, _ = load("qwen2_vl")
    adapted = vlm.FastVisionModel.get_peft_model(model, r=2)
    with pytest.raises(ConfigError, match="has an adapter already"):
        vlm.FastVisionModel.get_peft_model(adapted, r=2)
    with pytest.raises(ConfigError, match=r"does not come from vlm\.FastVisionModel"):
        vlm.FastVisionModel.for_inference(torch.nn.Linear(1, 1))
    with pytest.raises(ModelError, match="does not exist"):
        vlm.FastVisionModel.from_pretrained("./nowhere")


@pytest.mark.parametrize("checkpointing", [True, False])
def test_modes(load: Callable, checkpointing: bool) -> None:
    model, _ = load("qwen2_5_vl", use_gradient_checkpointing=not checkpointing)
    model = vlm.FastVisionModel.get_peft_model(model, r=2, use_gradient_checkpointing=checkpointing)
    assert vlm.FastVisionModel.for_training(model) is model
    assert model.training

    def recomputing() -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    assert recomputing() == checkpointing
    model.config.use_cache = False
    assert vlm.FastVisionModel.for_inference(model) is model
    assert not any(module.training for module in model.modules())
    assert not recomputing()
    assert model.config.use_cache
    vlm.FastVisionModel.for_training(model, use_gradient_checkpointing=not checkpointing)
    assert recomputing() != checkpointing


def test_full_finetuning_trains_everything(load: Callable, tiny_run: Callable) -> None:
    model, _ = load("qwen2_5_vl", full_finetuning=True)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    run = tiny_run("qwen2_5_vl")
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1])
    assert torch.equal(logits(model, batch), logits(run.loaded.model, batch))
    with pytest.raises(ConfigError, match="leave this call out"):
        vlm.FastVisionModel.get_peft_model(model)
    model, _ = load("qwen2_5_vl")
    with pytest.raises(LoraError, match="no place in the model"):
        load_tensors(vlm.FastVisionModel.get_peft_model(model, r=2), run.checkpoint_dir / "model" / "model.safetensors")
