"""A bare TRL trainer over the facade does what our own trainer does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import vlm
from tests.support.tiny_models import TINY, TINY_FAMILIES, UNLIKE_FAMILIES
from vlm.config import LoraConfig, TrainingConfig
from vlm.lora.build import build_adapter
from vlm.lora.peft_model import WEIGHTS_FILE, adapter_parameters, load_tensors
from vlm.training.plan import make_plan
from vlm.training.train import train_adapter

pytestmark = [
    # trl sets them itself in its own configuration, under the old names.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_kwargs` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


class Watch(TrainerCallback):
    """Keeps the gradients of the first step, and every precision that the trained weights have."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.dtypes: set[torch.dtype] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        parameters = adapter_parameters(model)
        self.dtypes |= {parameter.dtype for parameter in parameters.values()}
        if not self.gradients:
            self.gradients = {
                key: parameter.grad.clone() for key, parameter in parameters.items() if parameter.grad is not None
            }


def bare_trainer(model: Any, processor: Any, rows: Any, folder: Path, watch: Watch, **settings: Any) -> Any:
    """TRL's trainer with what the notebooks put into it."""
    from trl import SFTConfig, SFTTrainer

    collator = {name: settings.pop(name) for name in ("train_on_responses_only",) if name in settings}
    vlm.FastVisionModel.for_training(model)
    return SFTTrainer(
        model=model,
        processing_class=processor,
        data_collator=vlm.VisionDataCollator(model, processor, **collator),
        train_dataset=vlm.to_dataset(rows),
        callbacks=[watch],
        args=SFTConfig(
            **{
                "output_dir": str(folder),
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 4,
                "warmup_steps": 0,
                "max_steps": 1,
                "learning_rate": 2e-4,
                "max_grad_norm": 0,
                "logging_steps": 1,
                "optim": "adamw_torch",
                "weight_decay": 0.0,
                "lr_scheduler_type": "linear",
                "seed": 3407,
                "report_to": "none",
                "save_strategy": "no",
                "remove_unused_columns": False,
                "dataset_text_field": "",
                "dataset_kwargs": {"skip_prepare_dataset": True},
                "max_length": 2048,
                "bf16": vlm.is_bf16_supported(),
                "use_cpu": True,
                "disable_tqdm": True,
            }
            | settings
        ),
    )


def own_training(run: Any, lora: LoraConfig, folder: Path, watch: Watch, **settings: Any) -> float:
    """Our own trainer over all rows in one step; gives its loss."""
    training = TrainingConfig(
        max_steps=1,
        batch_size=2,
        gradient_accumulation=4,
        max_grad_norm=0,
        warmup_fraction=0,
        weight_decay=0,
        **settings,
    )
    places = run.dataset_dir, run.checkpoint_dir, folder / "initial"
    make_plan(*places, training, folder / "plan", device="cpu", dtype="float32")
    summary = train_adapter(
        run.loaded,
        folder / "initial",
        run.dataset_dir,
        folder / "plan",
        training,
        folder / "out",
        work_dir=folder / "work",
        callbacks=[watch],
    )
    assert summary.final_loss is not None
    return summary.final_loss


def start(run: Any, lora: LoraConfig, folder: Path) -> Path:
    """An initial adapter away from zero: as long as B is zero, the gradient of A is."""
    build_adapter(run.loaded, lora, folder)
    if lora.full_finetuning:
        return folder
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / WEIGHTS_FILE)
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor.normal_(0, 0.1, generator=generator)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return folder


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for key in expected:
        # Sums of some hundred float32 terms in another order: the trainers cut the step into other micro-batches.
        torch.testing.assert_close(
            found[key], expected[key], atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert all(gradient.abs().max() > 0 for gradient in expected.values())


@pytest.mark.parametrize(
    ("model_type", "responses_only"),
    [*((model_type, True) for model_type in TINY_FAMILIES), *((model_type, False) for model_type in UNLIKE_FAMILIES)],
)
def test_gradients_are_those_of_our_own_trainer(
    load: Callable, tiny_run: Callable, rows_of: Callable, tmp_path: Path, model_type: str, responses_only: bool
) -> None:
    run = tiny_run(model_type)
    lora = LoraConfig(rank=4, seed=3407)
    initial = start(run, lora, tmp_path / "initial")
    ours, bare = Watch(), Watch()
    loss = own_training(run, lora, tmp_path, ours, train_on_prompts=not responses_only)
    model, processor = load(model_type)
    model = vlm.FastVisionModel.get_peft_model(model, r=4)
    load_tensors(model, initial / WEIGHTS_FILE)
    rows = rows_of(run.dataset_dir)
    trainer = bare_trainer(model, processor, rows, tmp_path / "bare", bare, train_on_responses_only=responses_only)
    result = trainer.train()
    assert result.training_loss == pytest.approx(loss, abs=1e-5)
    assert_same(bare.gradients, ours.gradients)
    expected = load_file(tmp_path / "out" / "adapter" / WEIGHTS_FILE)
    for key, parameter in adapter_parameters(model).items():
        # AdamW's first step is lr · sign(gradient), whatever its size: a quarter of it is far from both signs. Only
        # where the gradient is as small as AdamW's epsilon, or as float32's errors in it, is it anything in between.
        sure = ours.gradients[key].abs() > 1e-6
        assert sure.float().mean() > 0.9
        torch.testing.assert_close(parameter.data[sure], expected[key][sure], atol=5e-5, rtol=0)


@pytest.mark.parametrize("model_type", UNLIKE_FAMILIES)
def test_full_finetuning_gradients_are_those_of_our_own_trainer(
    load: Callable, tiny_run: Callable, rows_of: Callable, tmp_path: Path, model_type: str
) -> None:
    run = tiny_run(model_type)
    lora = LoraConfig(full_finetuning=("vision", "projector", "language"))
    start(run, lora, tmp_path / "initial")
    ours, bare = Watch(), Watch()
    loss = own_training(run, lora, tmp_path, ours)
    model, processor = load(model_type, full_finetuning=True)
    rows = rows_of(run.dataset_dir)
    trainer = bare_trainer(model, processor, rows, tmp_path / "bare", bare, train_on_responses_only=True)
    assert trainer.train().training_loss == pytest.approx(loss, abs=1e-5)
    assert set(ours.gradients) == set(bare.gradients)
    assert set(ours.gradients) == set(load_file(tmp_path / "out" / "adapter" / WEIGHTS_FILE)) - set(
        TINY[model_type].idle_parameters
    )
    trained = {key: gradient for key, gradient in ours.gradients.items() if gradient.abs().max() > 0}
    # Of the key's bias, softmax sees nothing: its gradient is zero but for rounding.
    assert_same({key: bare.gradients[key] for key in trained}, trained)
    assert len(trained) > 0.9 * len(ours.gradients)


def test_an_nf4_base_keeps_its_adapter_in_float32(
    load: Callable, tiny_run: Callable, rows_of: Callable, tmp_path: Path
) -> None:
    model, processor = load("qwen2_5_vl", load_in_4bit=True)
    model = vlm.FastVisionModel.get_peft_model(model, r=4)
    watch = Watch()
    rows = rows_of(tiny_run("qwen2_5_vl").dataset_dir)
    settings = {
        "max_steps": 3,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
    }
    trainer = bare_trainer(model, processor, rows, tmp_path, watch, **settings)
    trainer.train()
    assert watch.dtypes == {torch.float32}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3


def test_a_bare_trainer_resumes_to_the_same_weights(
    load: Callable, tiny_run: Callable, rows_of: Callable, tmp_path: Path
) -> None:
    rows = rows_of(tiny_run("qwen2_vl").dataset_dir)
    ends = []
    for resume in (False, True):
        model, processor = load("qwen2_vl")
        model = vlm.FastVisionModel.get_peft_model(model, r=2)
        settings = {"max_steps": 4, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 2}
        trainer = bare_trainer(model, processor, rows, tmp_path / "out", Watch(), **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2") if resume else None)
        ends.append({key: parameter.data.clone() for key, parameter in adapter_parameters(model).items()})
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert (tmp_path / "out" / "checkpoint-4" / "processing.json").is_file()
