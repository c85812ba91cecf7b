"""The whole way on a GPU: bfloat16 over NF4 with the 8-bit optimiser, answers, and the merged model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_models import make_tiny_checkpoint
from tests.support.tiny_runs import batch_of, mixed_rows, write_dataset
from vlm.config import GenerationConfig, LoraConfig, ModelConfig, TrainingConfig
from vlm.families import FAMILIES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_train_answer_and_merge(tmp_path: Path, model_type: str, quantization: str) -> None:
    from vlm.export import export
    from vlm.generate import generate_predictions
    from vlm.loading.build import build_checkpoint
    from vlm.loading.checkpoint import load_checkpoint, load_model
    from vlm.lora.attach import attached
    from vlm.lora.build import build_adapter
    from vlm.training.plan import make_plan
    from vlm.training.train import train_adapter

    source = make_tiny_checkpoint(model_type, tmp_path / "source")
    checkpoint = tmp_path / "checkpoint"
    model_config = ModelConfig(name=str(source), quantization=quantization)
    build_checkpoint(model_config, checkpoint, device="cuda", dtype="bfloat16")
    loaded = load_checkpoint(checkpoint, device="cuda")
    rows = {"train": mixed_rows(8), "validation": mixed_rows(2), "test": mixed_rows(3)}
    dataset = write_dataset(tmp_path / "dataset", loaded.processing, rows)
    build_adapter(loaded, LoraConfig(rank=8, modules_to_save=("lm_head",)), tmp_path / "initial")
    training = TrainingConfig(
        max_steps=6, batch_size=4, gradient_accumulation=2, learning_rate=5e-3, warmup_fraction=0, log_every_steps=1
    )
    plan = make_plan(
        dataset, checkpoint, tmp_path / "initial", training, tmp_path / "plan", device="cuda", dtype="bfloat16"
    )
    assert plan.optimizer == "adamw_8bit"
    summary = train_adapter(
        loaded, tmp_path / "initial", dataset, tmp_path / "plan", training, tmp_path / "out", work_dir=tmp_path / "work"
    )
    # A random model starts near log(1024 words) = 6.9.
    assert summary.final_loss is not None
    assert summary.final_loss < 5.5
    adapter = tmp_path / "out" / "adapter"
    generation = GenerationConfig(batch_size=2, max_new_tokens=4)
    assert generate_predictions(loaded, dataset, generation, tmp_path / "p", adapter_dir=adapter).num_rows == 3

    export("merged_16bit", checkpoint, adapter, tmp_path / "merged", max_shard_size_mb=4000, device="cuda")
    merged = load_model(tmp_path / "merged", loaded.family, device="cuda", dtype="bfloat16")
    batch = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in batch_of(loaded, dataset, "test", [0, 1]).items()
    }
    mask = batch.pop("attention_mask")
    del batch["labels"]
    with torch.no_grad():
        found = merged(**batch, attention_mask=mask).logits[mask.bool()].float()
        with attached(loaded, adapter) as model:
            expected = model(**batch, attention_mask=mask).logits[mask.bool()].float()
    # bfloat16 has 8 bits: each of a dozen layers rounds by up to 2^-9; int8 also rounds activations to 8 bits.
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("parts", [("vision",), ("vision", "projector", "language")], ids=["vision", "all"])
def test_full_finetuning_keeps_float32_weights_over_a_bfloat16_base(
    tmp_path: Path, model_type: str, parts: tuple[str, ...]
) -> None:
    from vlm.export import export
    from vlm.generate import generate_predictions
    from vlm.loading.build import build_checkpoint
    from vlm.loading.checkpoint import load_checkpoint, load_model
    from vlm.lora.attach import attached
    from vlm.lora.build import build_adapter
    from vlm.training.plan import make_plan
    from vlm.training.train import train_adapter

    source = make_tiny_checkpoint(model_type, tmp_path / "source")
    checkpoint = tmp_path / "checkpoint"
    build_checkpoint(ModelConfig(name=str(source), quantization="none"), checkpoint, device="cuda", dtype="bfloat16")
    loaded = load_checkpoint(checkpoint, device="cuda")
    rows = {"train": mixed_rows(8), "validation": mixed_rows(2), "test": mixed_rows(3)}
    dataset = write_dataset(tmp_path / "dataset", loaded.processing, rows)
    build_adapter(loaded, LoraConfig(full_finetuning=parts), tmp_path / "initial")
    # Steps so small that weights in bfloat16 would stay where they are.
    training = TrainingConfig(
        max_steps=4, batch_size=4, gradient_accumulation=2, learning_rate=2e-5, warmup_fraction=0, log_every_steps=1
    )
    make_plan(dataset, checkpoint, tmp_path / "initial", training, tmp_path / "plan", device="cuda", dtype="bfloat16")
    train_adapter(
        loaded, tmp_path / "initial", dataset, tmp_path / "plan", training, tmp_path / "out", work_dir=tmp_path / "work"
    )
    adapter = tmp_path / "out" / "adapter"
    trained = load_file(adapter / "adapter_model.safetensors")
    base = dict(loaded.model.named_parameters())
    assert all(base[name].dtype == torch.bfloat16 for name in trained)
    moved = [name for name, tensor in trained.items() if not torch.equal(tensor, base[name].detach().float().cpu())]
    assert len(moved) > 0.9 * len(trained)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in trained.values())
    generation = GenerationConfig(batch_size=2, max_new_tokens=4)
    assert generate_predictions(loaded, dataset, generation, tmp_path / "p", adapter_dir=adapter).num_rows == 3

    export("merged_16bit", checkpoint, adapter, tmp_path / "merged", max_shard_size_mb=4000, device="cuda")
    merged = load_model(tmp_path / "merged", loaded.family, device="cuda", dtype="bfloat16")
    with attached(loaded, adapter) as model:
        for name, parameter in merged.named_parameters():
            assert torch.equal(parameter, dict(model.named_parameters())[name]), name
