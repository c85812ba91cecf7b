from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.support.tiny_models import TINY
from tests.support.tiny_training import ALL_PARTS, Gradients, Training, fill
from vlm.config import LoraConfig
from vlm.errors import ConfigError
from vlm.families import FAMILIES
from vlm.lora.attach import attached
from vlm.lora.peft_model import adapter_parameters


class Rates(TrainerCallback):
    """Keeps the optimiser's groups."""

    def __init__(self) -> None:
        self.groups: list[tuple[float, float, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.groups = [
            (group["initial_lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups
        ]


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    "lora",
    [LoraConfig(rank=2, finetune_projector=True, modules_to_save=("lm_head",)), ALL_PARTS],
    ids=["adapter", "full"],
)
def test_each_part_learns_at_its_own_rate(
    tiny_run: Callable, tmp_path: Path, model_type: str, lora: LoraConfig
) -> None:
    run = tiny_run(model_type)
    rates = {"vision": 1e-4, "projector": 3e-4, "language": 1e-3}
    training = Training(
        run,
        tmp_path,
        lora,
        max_steps=1,
        batch_size=4,
        gradient_accumulation=1,
        schedule="constant",
        max_grad_norm=0,
        weight_decay=0.1,
        learning_rate=rates["language"],
        vision_learning_rate=rates["vision"],
        projector_learning_rate=rates["projector"],
    )
    if not lora.full_finetuning:
        fill(tmp_path / "initial")  # as long as B is zero, the gradient of A is
    gradients, seen = Gradients(), Rates()
    training.start([gradients, seen])
    assert {rate for rate, _, _ in seen.groups} == set(rates.values())
    assert seen.groups[0][0] == rates["language"]  # the one that is logged

    # By hand: one AdamW over three groups, told apart by what is written in the names.
    with attached(run.loaded, tmp_path / "initial", trainable=True) as model:
        parameters = {key: parameter.detach().clone() for key, parameter in adapter_parameters(model).items()}
    assert sum(count for _, _, count in seen.groups) == len(parameters)
    assert set(gradients.found) == set(parameters) - set(TINY[model_type].idle_parameters)
    groups = []
    for key, tensor in parameters.items():
        is_projector = any(
            word in key
            for word in ("visual.merger", "projector", "connector", "vision_projection", "image_newline", "view_sep")
        )
        towers = (
            "visual.",
            "vision_tower.",
            "vision_model.",
            "vision_encoder.",
            "sam_model.",
            "qwen2_model.",
            "query_768",
            "query_1024",
        )
        is_vision = any(word in key for word in towers)
        part = "projector" if is_projector else "vision" if is_vision else "language"
        tensor.grad = gradients.found.get(key)  # what has none stays as it is, undecayed
        # Norms and biases are the ones with a single axis.
        groups.append({"params": [tensor], "lr": rates[part], "weight_decay": 0.1 if tensor.ndim > 1 else 0.0})
    torch.optim.AdamW(groups).step()
    for key, tensor in parameters.items():
        torch.testing.assert_close(training.weights[key], tensor, atol=1e-7, rtol=1e-6)


def test_a_rate_for_what_does_not_learn_is_refused(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    with pytest.raises(ConfigError, match=r"projector_learning_rate is 0\.0001 but nothing in the projector learns"):
        Training(run, tmp_path / "a", LoraConfig(rank=2), projector_learning_rate=1e-4)
    with pytest.raises(ConfigError, match=r"turn lora\.finetune_vision_layers on"):
        Training(run, tmp_path / "b", LoraConfig(full_finetuning=("language",)), vision_learning_rate=1e-4)


def test_learning_rate_follows_the_schedule(tiny_run: Callable, tmp_path: Path) -> None:
    rates = {}
    for schedule in ("linear", "cosine", "constant"):
        training = Training(
            tiny_run("qwen2_5_vl"),
            tmp_path / schedule,
            LoraConfig(rank=1, finetune_vision_layers=False),
            max_steps=4,
            batch_size=1,
            gradient_accumulation=1,
            learning_rate=1e-3,
            warmup_fraction=0.5,
            schedule=schedule,
        )
        training.start()
        rates[schedule] = [round(line["learning_rate"] * 1e3, 6) for line in training.metrics if "loss" in line]
    assert rates["linear"] == [0, 0.5, 1, 0.5]
    assert rates["cosine"] == [0, 0.5, 1, 0.5]
    assert rates["constant"] == [0, 0.5, 1, 1]
