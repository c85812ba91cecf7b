import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import TINY
from tests.support.tiny_runs import batch_of
from vlm.config import LoraConfig
from vlm.errors import ExportError
from vlm.export import export
from vlm.families import FAMILIES
from vlm.lora.attach import attached
from vlm.lora.build import build_adapter
from vlm.lora.peft_model import adapter_parameters, save_tensors
from vlm.processing import Processing

PLAIN = LoraConfig(rank=4)
RICH = LoraConfig(
    rank=4,
    rank_pattern={"v_proj": 2},
    use_dora=True,
    use_rslora=True,
    finetune_projector=True,
    modules_to_save=("lm_head",),
)


def make_adapter(run: Any, folder: Path, lora: LoraConfig) -> Path:
    """An adapter with noise in all its tensors, as if trained."""
    build_adapter(run.loaded, lora, folder)
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "lora_B" in key:
            tensor.normal_(0, 0.1, generator=generator)
        elif "lora_A" not in key:
            tensor *= 1 + 0.2 * torch.rand(tensor.shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def logits_alone(model: Any, run: Any, rows: list[int]) -> torch.Tensor:
    """Logits of the rows' own tokens, one row at a time: what plain transformers gives must not need our batches."""
    batches = [batch_of(run.loaded, run.dataset_dir, "train", [row]) for row in rows]
    return torch.cat([logits(model, batch)[0] for batch in batches])


def run_export(kind: Any, run: Any, adapter: Path, output: Path, **settings: Any) -> Any:
    settings = {"max_shard_size_mb": 4000, "device": "cpu"} | settings
    return export(kind, run.checkpoint_dir, adapter, output, **settings)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("quantization", "lora"),
    [("none", PLAIN), ("none", RICH), ("nf4", RICH)],
    ids=lambda value: str(value)[:6],
)
def test_the_merged_model_is_the_adapted_one(
    tiny_run: Callable, tmp_path: Path, model_type: str, quantization: str, lora: LoraConfig
) -> None:
    from transformers import AutoModelForImageTextToText

    run = tiny_run(model_type, quantization)
    if lora is RICH:
        lora = TINY[model_type].possible(lora)
    adapter = make_adapter(run, tmp_path / "adapter", lora)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1, 2])
    with attached(run.loaded, adapter) as model:
        expected = logits(model, batch)
    base = logits(run.loaded.model, batch)
    summary = run_export("merged_16bit", run, adapter, tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "merged", dtype="auto", local_files_only=True
    ).eval()
    mask = batch["attention_mask"].bool()
    found, expected, base = logits_alone(merged, run, [0, 1, 2]), expected[mask], base[mask]
    # W x + s B (A x) against (W + s B A) x in float32: rounding of 64 to 256 terms per layer, over a dozen layers.
    # bitsandbytes' CPU matmul over NF4 rounds its own way.
    atol = 2e-4 if quantization == "none" else 2e-3
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-3)
    assert (expected - base).abs().max() > 100 * (found - expected).abs().max()
    targets = json.loads((adapter / "targets.json").read_text())
    assert summary.num_adapted_modules == len(targets["targets"])
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert Processing.from_dir(tmp_path / "merged").family.model_type == model_type


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_merged_int8_weights_are_the_stored_ones_and_the_update(
    tiny_run: Callable, tmp_path: Path, model_type: str
) -> None:
    from transformers import AutoModelForImageTextToText

    run = tiny_run(model_type, "int8")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    run_export("merged_16bit", run, adapter, tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", local_files_only=True).eval()
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1, 2])
    num_compared = 0
    with attached(run.loaded, adapter) as model:
        expected = logits(model, batch)
        for name, module in model.get_base_model().named_modules():
            if not hasattr(module, "lora_A") or hasattr(module, "parameter_name"):
                continue  # experts are not quantised
            num_compared += 1
            scale = module.base_layer.state.SCB
            weight = module.base_layer.weight.float() * scale[:, None] / 127
            update = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
            torch.testing.assert_close(merged.get_submodule(name).weight, weight + update, atol=1e-6, rtol=1e-6)
    num_targets = json.loads((adapter / "targets.json").read_text())["num_targets"]
    assert num_compared == num_targets - len(TINY[model_type].language_experts)
    # The live model also rounds activations to 8 bits (1/254 of a row's largest, in every layer); the merged one does
    # not, so their outputs agree to a few per cent only.
    found, expected = logits_alone(merged, run, [0, 1, 2]), expected[batch["attention_mask"].bool()]
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_small_shards_have_an_index_and_the_same_weights(
    tiny_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm.export import shards

    run = tiny_run("qwen2_vl", "nf4")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    run_export("merged_16bit", run, adapter, tmp_path / "one")
    sizes: list[int] = []
    save = shards.save_file

    def spy(tensors: dict[str, torch.Tensor], path: Path, metadata: Any) -> None:
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(shards, "save_file", spy)
    run_export("merged_16bit", run, adapter, tmp_path / "many", max_shard_size_mb=1)
    assert len(sizes) > 1
    assert max(sizes) <= 1_000_000
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert set(index["weight_map"]) == set(one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    for key, name in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / name)[key], one[key])
    assert not list((tmp_path / "many").glob("draft*"))


def test_the_same_export_gives_the_same_bytes(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl", "nf4")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    for kind in ("lora", "merged_16bit"):
        for name in ("first", "second"):
            run_export(kind, run, adapter, tmp_path / kind / name)
        for path in (tmp_path / kind / "first").rglob("*"):
            if path.is_file():
                twin = tmp_path / kind / "second" / path.relative_to(tmp_path / kind / "first")
                assert path.read_bytes() == twin.read_bytes(), path.name
                assert str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("parts", [("vision", "projector", "language"), ("projector",)], ids=["all", "projector"])
def test_fully_trained_weights_are_exported_as_they_are(
    tiny_run: Callable, tmp_path: Path, model_type: str, parts: tuple[Any, ...]
) -> None:
    from transformers import AutoModelForImageTextToText

    run = tiny_run(model_type)
    adapter = make_fully_trained(run, tmp_path / "adapter", LoraConfig(full_finetuning=parts))
    with attached(run.loaded, adapter) as model:
        expected = logits_alone(model, run, [0, 1, 2])
    summary = run_export("merged_16bit", run, adapter, tmp_path / "merged", max_shard_size_mb=1)
    merged = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "merged", dtype="auto", local_files_only=True
    ).eval()
    assert torch.equal(logits_alone(merged, run, [0, 1, 2]), expected)
    assert summary.num_adapted_modules == json.loads((adapter / "targets.json").read_text())["num_targets"]
    assert f"Trained whole: {', '.join(sorted(parts))};" in (tmp_path / "merged" / "README.md").read_text()
    with pytest.raises(ExportError, match="trained whole, without an adapter; export 'merged_16bit'"):
        run_export("lora", run, adapter, tmp_path / "lora")


def make_fully_trained(run: Any, folder: Path, lora: LoraConfig) -> Path:
    build_adapter(run.loaded, lora, folder)
    generator = torch.Generator().manual_seed(1)
    with attached(run.loaded, folder, trainable=True) as model:
        for parameter in adapter_parameters(model).values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        save_tensors(model, folder / "adapter_model.safetensors")
    return folder


def test_tied_weights_trained_whole_stay_tied(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    from tests.support.tiny_models import make_tiny_checkpoint
    from tests.support.tiny_runs import load, mixed_rows, write_dataset
    from tests.vlm.conftest import TinyRun
    from vlm.config import ModelConfig
    from vlm.loading.build import build_checkpoint

    source = make_tiny_checkpoint("qwen2_vl", tmp_path / "source", tie_word_embeddings=True)
    build_checkpoint(
        ModelConfig(name=str(source), quantization="none"), tmp_path / "checkpoint", device="cpu", dtype="float32"
    )
    loaded = load(tmp_path / "checkpoint")
    assert loaded.model.lm_head.weight is loaded.model.model.language_model.embed_tokens.weight
    run = TinyRun(loaded, write_dataset(tmp_path / "dataset", loaded.processing, {"train": mixed_rows(2)}))
    adapter = make_fully_trained(run, tmp_path / "adapter", LoraConfig(full_finetuning=("language",)))
    batch = batch_of(loaded, run.dataset_dir, "train", [0, 1])
    with attached(loaded, adapter) as model:
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        expected = logits(model, batch)
    run_export("merged_16bit", run, adapter, tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", local_files_only=True).eval()
    assert merged.lm_head.weight is merged.model.language_model.embed_tokens.weight
    assert torch.equal(logits(merged, batch), expected)


@pytest.mark.parametrize("trained", ["lm_head", "embed_tokens", None])
def test_tied_weights_stay_tied_unless_one_of_them_was_trained(tmp_path: Path, trained: str | None) -> None:
    from transformers import AutoModelForImageTextToText, Qwen2VLForConditionalGeneration

    from tests.support.tiny_models import make_tiny_checkpoint
    from tests.support.tiny_runs import load, mixed_rows, write_dataset
    from tests.vlm.conftest import TinyRun
    from vlm.config import ModelConfig
    from vlm.loading.build import build_checkpoint

    source = make_tiny_checkpoint("qwen2_vl", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    weights.pop("lm_head.weight", None)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    build_checkpoint(
        ModelConfig(name=str(source), quantization="none"), tmp_path / "checkpoint", device="cpu", dtype="float32"
    )
    loaded = load(tmp_path / "checkpoint")
    run = TinyRun(loaded, write_dataset(tmp_path / "dataset", loaded.processing, {"train": mixed_rows(2)}))
    assert isinstance(loaded.model, Qwen2VLForConditionalGeneration)
    assert loaded.model.lm_head.weight is loaded.model.model.language_model.embed_tokens.weight
    lora = LoraConfig(target_modules=("q_proj",), rank=2, modules_to_save=(trained,) if trained else ())
    adapter = make_adapter(run, tmp_path / "adapter", lora)
    batch = batch_of(loaded, run.dataset_dir, "train", [0, 1])
    with attached(loaded, adapter) as model:
        expected = logits(model, batch)
    run_export("merged_16bit", run, adapter, tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", local_files_only=True).eval()
    assert (merged.lm_head.weight is merged.model.language_model.embed_tokens.weight) == (trained is None)
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(merged, batch)[mask], expected[mask], atol=2e-4, rtol=1e-3)
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) == (trained is not None)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_lora_export_loads_with_plain_peft(tiny_run: Callable, tmp_path: Path, model_type: str) -> None:
    import peft

    from vlm.lora.attach import detach_adapter

    run = tiny_run(model_type)
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1])
    with attached(run.loaded, adapter) as model:
        expected = logits(model, batch)
    metric = {"title": "CER", "better": "lower", "tuned": {"value": 0.1, "low": 0.05, "high": 0.2}, "base": None}
    figures = {"split": "test", "num_rows": 5, "confidence": 0.95, "metrics": {"cer": metric}}
    summary = run_export("lora", run, adapter, tmp_path / "lora", figures=figures)
    plain = peft.PeftModel.from_pretrained(run.loaded.model, str(tmp_path / "lora")).eval()
    try:
        assert torch.equal(logits(plain, batch), expected)
    finally:
        detach_adapter(plain)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "| CER (lower is better) | 0.1000 [0.0500, 0.2000] |  |" in card
    assert "library_name: peft" in card
    assert f'from_pretrained("{json.loads((run.checkpoint_dir / "checkpoint.json").read_text())["source"]}")' in card
    assert summary.num_files == len(list((tmp_path / "lora").iterdir()))
    assert Processing.from_dir(tmp_path / "lora").family.model_type == model_type


def test_an_adapter_that_does_not_fit_is_not_merged(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    # Its gate projections of the vision tower do not exist in the other family.
    with pytest.raises(ExportError, match=r"adapted modules were merged; .* has no weight"):
        run_export("merged_16bit", tiny_run("qwen2_vl"), adapter, tmp_path / "merged")
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, adapter / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="disagree on 1 modules"):
        run_export("lora", run, adapter, tmp_path / "lora")


def test_a_wrong_merge_is_caught_after_writing(
    tiny_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm.export.factors import LoraFactors

    run = tiny_run("qwen2_5_vl")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    monkeypatch.setattr(LoraFactors, "merge", lambda self, weight: weight)
    with pytest.raises(ExportError, match="away from the adapter's"):
        run_export("merged_16bit", run, adapter, tmp_path / "merged")
