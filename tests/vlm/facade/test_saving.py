import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vlm
from tests.support.tiny_models import TINY_FAMILIES
from tests.support.tiny_runs import batch_of
from vlm.errors import ConfigError, ExportError
from vlm.lora.attach import detach_adapter
from vlm.lora.peft_model import adapter_parameters
from vlm.processing import Processing


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def stir(model: Any) -> None:
    """As if trained: noise in all that learns."""
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("model_type", TINY_FAMILIES)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_a_saved_adapter_comes_back(load: Callable, tiny_run: Callable, tmp_path: Path, model_type: str) -> None:
    import peft

    run = tiny_run(model_type)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1])
    model, processor = load(model_type)
    model = vlm.FastVisionModel.get_peft_model(model, r=4, modules_to_save=["lm_head"])
    stir(model)
    model.save_pretrained(tmp_path / "lora")
    processor.save_pretrained(tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run.checkpoint_dir.parent / "source")
    again, again_processor = vlm.FastVisionModel.from_pretrained(str(tmp_path / "lora"), load_in_4bit=False)
    expected = logits(vlm.FastVisionModel.for_inference(model), batch)
    assert torch.equal(logits(again, batch), expected)
    assert (logits(run.loaded.model, batch) - expected).abs().max() > 0.01
    assert again_processor.processing.family.model_type == model_type
    assert any(parameter.requires_grad for parameter in again.parameters())  # training may go on
    plain = peft.PeftModel.from_pretrained(run.loaded.model, str(tmp_path / "lora")).eval()
    try:
        assert torch.equal(logits(plain, batch), expected)
    finally:
        detach_adapter(plain)


@pytest.mark.parametrize("model_type", TINY_FAMILIES)
@pytest.mark.parametrize("full", [False, True])
def test_a_merged_model_is_the_trained_one(
    load: Callable, tiny_run: Callable, tmp_path: Path, model_type: str, full: bool
) -> None:
    from transformers import AutoModelForImageTextToText

    run = tiny_run(model_type)
    # Row by row: what plain transformers gives must not need our batches.
    rows = [batch_of(run.loaded, run.dataset_dir, "train", [row]) for row in range(3)]
    model, processor = load(model_type, full_finetuning=full)
    if not full:
        model = vlm.FastVisionModel.get_peft_model(model, r=4)
    stir(model)
    model.save_pretrained_merged(tmp_path / "merged", processor, max_shard_size="1MB")
    model.save_pretrained_merged(tmp_path / "again", processor.tokenizer, save_method="merged_16bit")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == 1
    expected = [logits(vlm.FastVisionModel.for_inference(model), row) for row in rows]
    assert (logits(run.loaded.model, rows[0]) - expected[0]).abs().max() > 0.01
    for folder in ("merged", "again"):
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / folder, local_files_only=True).eval()
        # W x + s B (A x) against (W + s B A) x; whole weights are the very same.
        found = [logits(merged, row) for row in rows]
        torch.testing.assert_close(found, expected, atol=0 if full else 2e-4, rtol=1e-3)
        assert Processing.from_dir(tmp_path / folder).family.model_type == model_type
    reloaded, _ = vlm.FastVisionModel.from_pretrained(str(tmp_path / "merged"), load_in_4bit=False)
    torch.testing.assert_close([logits(reloaded, row) for row in rows], expected, atol=2e-4, rtol=1e-3)


def test_an_adapter_made_elsewhere(load: Callable, tmp_path: Path) -> None:
    model, processor = load("qwen2_vl")
    model = vlm.FastVisionModel.get_peft_model(model, r=2, rank_pattern={"v_proj": 1}, modules_to_save=["lm_head"])
    stir(model)
    model.save_pretrained(tmp_path / "lora")
    own = json.loads((tmp_path / "lora" / "targets.json").read_text())
    (tmp_path / "lora" / "targets.json").unlink()  # only we write this file
    again, _ = vlm.FastVisionModel.from_pretrained(str(tmp_path / "lora"), load_in_4bit=False)
    again.save_pretrained(tmp_path / "again")
    found = json.loads((tmp_path / "again" / "targets.json").read_text())
    for content in (own, found):
        content.pop("seed", None)
        content["targets"].sort(key=lambda target: target["name"])
    assert found == own
    again.save_pretrained_merged(tmp_path / "merged")
    model.save_pretrained_merged(tmp_path / "expected", processor)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "expected")]
    assert files[0] == files[1]


def test_lora_as_a_method(load: Callable, tmp_path: Path) -> None:
    model, processor = load("qwen2_vl")
    model = vlm.FastVisionModel.get_peft_model(model, r=2)
    stir(model)
    model.save_pretrained_merged(tmp_path, processor, save_method="lora")
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(tensors[key], parameter) for key, parameter in adapter_parameters(model).items())


def test_full_weights_are_saved_as_transformers_does(load: Callable, tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1])
    model, _ = load("qwen2_5_vl", full_finetuning=True)
    stir(model)
    model.save_pretrained(tmp_path)
    again, _ = vlm.FastVisionModel.from_pretrained(str(tmp_path), load_in_4bit=False)
    assert torch.equal(logits(again, batch), logits(model, batch))
    with pytest.raises(ConfigError, match="has no adapter, all its weights were trained"):
        model.save_pretrained_merged(tmp_path / "x", save_method="lora")


def test_what_cannot_be_saved(load: Callable, tmp_path: Path) -> None:
    model, _ = load("qwen2_vl")
    with pytest.raises(ConfigError, match="nothing has been trained"):
        model.save_pretrained_merged(tmp_path)
    _, other = load("qwen2_vl")
    model = vlm.FastVisionModel.get_peft_model(model, r=2)
    for method in ("merged_2bit", "gguf"):
        with pytest.raises(ConfigError, match=f"'{method}' is not known here; use 'merged_16bit'"):
            model.save_pretrained_merged(tmp_path, save_method=method)
    with pytest.raises(ConfigError, match="not the processor that came with this model"):
        model.save_pretrained(tmp_path, other)
    with pytest.raises(ConfigError, match="safe_serialization=False would have no effect"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ConfigError, match="'big' is no size"):
        model.save_pretrained_merged(tmp_path, max_shard_size="big")
    assert not list(tmp_path.iterdir())


def test_uploading_offline_says_so(load: Callable) -> None:
    model, processor = load("qwen2_vl")
    model = vlm.FastVisionModel.get_peft_model(model, r=2)
    with pytest.raises(ExportError, match="Hub cannot be reached"):
        processor.push_to_hub("me/mine", token="hf_x")
    for push in (model.push_to_hub, model.push_to_hub_merged):
        with pytest.raises(ExportError, match=r"Hub cannot be reached for 'me/mine'.*save to a folder"):
            push("me/mine", processor, token="hf_x")
    with pytest.raises(ExportError, match="is no name on the Hub"):
        model.push_to_hub("not a name", processor, token="hf_x")


def test_uploads_are_what_is_saved(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen: list[Any] = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            seen.append(token)

        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
            seen.append((name, private, exist_ok))

        def upload_folder(self, *, folder_path: str, repo_id: str, commit_message: str) -> str:
            seen.append({path.name for path in Path(folder_path).iterdir()})
            return f"hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model, processor = load("qwen2_vl")
    model = vlm.FastVisionModel.get_peft_model(model, r=2)
    assert model.push_to_hub("me/lora", processor, token="hf_x", private=True) == "hub/me/lora"
    assert seen[:2] == ["hf_x", ("me/lora", True, True)]
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= seen[2]
    model.push_to_hub_merged("me/merged", processor)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= seen[5]


def test_quantised_and_gguf_files(load: Callable, tmp_path: Path) -> None:
    model, processor = load("qwen2_vl")
    model = vlm.FastVisionModel.get_peft_model(model, r=2)
    model.save_pretrained_merged(tmp_path / "four", processor, save_method="merged_4bit")
    assert '"load_in_4bit": true' in (tmp_path / "four" / "config.json").read_text()
    model.save_pretrained_gguf(tmp_path / "gguf", processor, quantization_method="Q4_0")
    assert {"model-q4_0.gguf", "mmproj-f16.gguf", "Modelfile"} <= {path.name for path in (tmp_path / "gguf").iterdir()}
    assert "PARAMETER num_ctx" in (tmp_path / "gguf" / "Modelfile").read_text()
    with pytest.raises(ConfigError, match="quantization_method 'q4_k_m' is not written here; use one of f16"):
        model.save_pretrained_gguf(tmp_path / "other", processor, quantization_method="q4_k_m")


@pytest.mark.parametrize("is_gguf", [False, True])
def test_a_file_that_is_not_what_was_trained_gets_no_name(
    load: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_gguf: bool
) -> None:
    import gguf

    from vlm.export.shards import ShardWriter

    model, processor = load("qwen2_vl")
    model = vlm.FastVisionModel.get_peft_model(model, r=2)
    add, quantize = ShardWriter.add, gguf.quants.quantize
    monkeypatch.setattr(ShardWriter, "add", lambda self, key, tensor: add(self, key, tensor * 1.1))
    monkeypatch.setattr(gguf.quants, "quantize", lambda values, kind: quantize(values * 1.1, kind))
    save = model.save_pretrained_gguf if is_gguf else model.save_pretrained_merged
    with pytest.raises(ExportError, match=r"away from the adapter's|further from the merged weight"):
        save(tmp_path / "out", processor)
    assert list((tmp_path / "out").iterdir()) == []
