"""Saved and reloaded models give the same bits, in every quantisation, and can be trained through."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_models import TINY, tiny_conversation
from tests.vlm.loading.conftest import Checkpoint
from vlm.config.model import Quantization
from vlm.errors import ModelError
from vlm.families import FAMILIES
from vlm.loading.checkpoint import LoadedModel, load_checkpoint, load_model

QUANTIZATIONS: tuple[Quantization, ...] = ("nf4", "int8", "none")


def inputs_of(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    messages, images = tiny_conversation("Total 12.50", ((56, 84), (84, 112)))
    ids = torch.tensor([loaded.processing.encode(messages, [image.shape[:2] for image in images]).input_ids])
    return {"input_ids": ids, **loaded.processing.model_inputs(ids, loaded.processing.pixel_inputs(images))}


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_reloaded_model_gives_the_same_bits(
    sources: dict[str, Path], checkpoint: Checkpoint, model_type: str, quantization: Quantization
) -> None:
    """Against the model as transformers quantises it from the source, without our save and reload between."""
    from transformers import BitsAndBytesConfig

    loaded = load_checkpoint(checkpoint(model_type, quantization), device="cpu")
    direct = {
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["lm_head"],
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]),
        "none": None,
    }[quantization]  # fmt: skip
    original = load_model(sources[model_type], loaded.family, device="cpu", dtype="float32", quantization=direct)
    stored, live = loaded.model.state_dict(), original.state_dict()
    assert stored.keys() == live.keys()
    assert [name for name in live if not torch.equal(stored[name], live[name])] == []
    inputs = inputs_of(loaded)
    expected = logits_of(original, inputs)
    assert torch.equal(logits_of(loaded.model, inputs), expected)
    assert expected.std() > 0.1
    if quantization != "none":
        plain = load_model(sources[model_type], loaded.family, device="cpu", dtype="float32")
        difference = (logits_of(plain, inputs) - expected).abs().max()
        assert 1e-4 < difference < 3  # quantised, but still the same model


def test_what_comes_with_a_loaded_model(checkpoint: Checkpoint, model_type: str) -> None:
    folder = checkpoint(model_type, "nf4")
    loaded = load_checkpoint(folder, device="cpu")
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.model.config.text_config.use_cache is True
    assert loaded.family is FAMILIES[model_type]
    assert (loaded.device, loaded.dtype, loaded.checkpoint_dir) == ("cpu", "float32", folder)
    assert loaded.model.generation_config.eos_token_id == list(loaded.processing.stop_token_ids)
    floating = {parameter.dtype for parameter in loaded.model.parameters() if parameter.is_floating_point()}
    assert floating == {torch.float32}


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_gradients_flow_through_quantised_layers_after_a_pass_in_eval_mode(
    checkpoint: Checkpoint, model_type: str, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU with AVX512-BF16, which the patch pretends, bitsandbytes would repack 4-bit weights in that pass."""
    import bitsandbytes as bnb

    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    assert bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu, "the patch takes"
    loaded = load_checkpoint(checkpoint(model_type, quantization), device="cpu")
    inputs = inputs_of(loaded)
    first = logits_of(loaded.model, inputs)
    for module in loaded.model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            assert not module.support_avx512bf16_for_cpu
            assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False)
    loaded.model.train()
    embedded = loaded.model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    layer = loaded.model.get_submodule(TINY[loaded.family.model_type].language_layers[0]).mlp
    layer(embedded).sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.abs().sum() > 0
    loaded.model.eval()
    assert torch.equal(logits_of(loaded.model, inputs), first)


def test_a_checkpoint_made_on_a_gpu_computes_in_float32_on_a_cpu(checkpoint: Checkpoint, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    shutil.copytree(checkpoint("qwen2_5_vl", "nf4"), tmp_path, dirs_exist_ok=True)
    for path, old, new in (
        ("checkpoint.json", '"dtype": "float32"', '"dtype": "bfloat16"'),
        ("model/config.json", '"bnb_4bit_compute_dtype": "float32"', '"bnb_4bit_compute_dtype": "bfloat16"'),
    ):
        text = (tmp_path / path).read_text()
        assert old in text
        (tmp_path / path).write_text(text.replace(old, new))
    loaded = load_checkpoint(tmp_path, device="cpu")
    assert loaded.dtype == "float32"
    layers = [module for module in loaded.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    reference = load_checkpoint(checkpoint("qwen2_5_vl", "nf4"), device="cpu")
    inputs = inputs_of(loaded)
    assert torch.equal(logits_of(loaded.model, inputs), logits_of(reference.model, inputs))


def test_int8_on_a_cpu_repeats_no_note_for_every_layer(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_checkpoint(checkpoint("qwen2_5_vl", "int8"), device="cpu")
    logits_of(loaded.model, inputs_of(loaded))
    assert caplog.records == []


def test_the_folder_is_not_written_to(checkpoint: Checkpoint, model_type: str) -> None:
    folder = checkpoint(model_type, "nf4")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    load_checkpoint(folder, device="cpu")
    assert {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()
    } == before


class TestDamaged:
    @pytest.fixture
    def folder(self, checkpoint: Checkpoint, tmp_path: Path) -> Path:
        shutil.copytree(checkpoint("qwen2_5_vl", "none"), tmp_path, dirs_exist_ok=True)
        return tmp_path

    def test_cut_short(self, folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ModelError, match=r"no whole safetensors file \(\d+ bytes of \d+\)"):
            load_checkpoint(folder, device="cpu")

    def test_without_description(self, folder: Path) -> None:
        (folder / "checkpoint.json").unlink()
        with pytest.raises(ModelError, match=r"has no checkpoint\.json"):
            load_checkpoint(folder, device="cpu")

    @pytest.mark.parametrize("change", ["drop", "reshape"])
    def test_with_a_weight_missing_or_of_another_shape(self, folder: Path, change: str) -> None:
        """Transformers goes on with random values in both cases; we do not."""
        from safetensors.torch import load_file, save_file

        path = folder / "model" / "model.safetensors"
        weights = load_file(path)
        name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
        weight = weights.pop(name)
        if change == "reshape":
            weights[name] = weight[:64].clone()
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(
            ModelError, match=r"lacks 1 weights of Qwen2\.5-VL, such as .*layers\.1\.mlp\.up_proj\.weight"
        ):
            load_checkpoint(folder, device="cpu")

    def test_with_another_familys_name(self, folder: Path) -> None:
        text = json.loads((folder / "checkpoint.json").read_text())
        (folder / "checkpoint.json").write_text(json.dumps({**text, "family": "qwen9"}))
        with pytest.raises(ModelError, match="'qwen9' is no family of the table"):
            load_checkpoint(folder, device="cpu")
