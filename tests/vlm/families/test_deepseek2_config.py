"""DeepSeek-OCR 2's published configuration: the numbers of the native class, and weights that find their places."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_deepseek_ocr import published_config
from vlm.builtin.model import fill_with_noise
from vlm.errors import ModelError
from vlm.families import FAMILIES, deepseek2_config, family_for_config
from vlm.families.deepseek2_config import translate
from vlm.loading.checkpoint import load_model

FAMILY = FAMILIES["deepseek_ocr2"]
ENCODER = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 128}


def published(width: int, **language: Any) -> dict[str, Any]:
    """The first model's published file with the second one's architecture and encoder."""
    config = copy.deepcopy(published_config())
    config["architectures"] = ["DeepseekOCR2ForCausalLM"]
    del config["vision_config"]["width"]["clip-l-14-224"]
    config["vision_config"]["width"]["qwen2-0-5b"] = {"dim": width}
    config["vision_config"]["width"]["sam_vit_b"]["downsample_channels"] = [64, 1024]
    config["language_config"] |= language
    return config


def test_architecture_and_not_model_type_decides() -> None:
    config = published(896)
    assert config["model_type"] == published_config()["model_type"] == "deepseek_vl_v2"
    assert family_for_config(config) is FAMILY
    assert family_for_config(published_config()) is FAMILIES["deepseek_ocr"]


def test_the_encoder_is_the_published_one() -> None:
    from transformers import DeepseekOcr2Config

    native = translate(published(896, num_hidden_layers=12, first_k_dense_replace=1))
    config = DeepseekOcr2Config.from_dict(native)
    encoder = config.vision_config.encoder_config
    # As printed in Qwen2-0.5B's own config.json.
    assert (encoder.hidden_size, encoder.num_hidden_layers, encoder.intermediate_size) == (896, 24, 4864)
    assert (encoder.num_attention_heads, encoder.num_key_value_heads) == (14, 2)
    assert encoder.rope_parameters["rope_theta"] == 1e6
    assert config.vision_config.sam_config.downsample_channels == [64, 896]
    assert config.text_config.mlp_layer_types == ["dense", *["sparse"] * 11]
    assert translate(native) == native


def test_another_encoder_is_refused() -> None:
    with pytest.raises(ModelError, match=r"qwen2-0-5b.dim 1536, but the published network has 896"):
        translate(published(1536))


def test_published_weights_find_their_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import DeepseekOcr2Config, DeepseekOcr2ForConditionalGeneration

    monkeypatch.setitem(deepseek2_config._ENCODERS, 64, ENCODER)
    model = DeepseekOcr2ForConditionalGeneration(DeepseekOcr2Config.from_dict(translate(published(64))))
    fill_with_noise(model, 0)
    model.save_pretrained(tmp_path)  # under the published names
    (tmp_path / "config.json").write_text(json.dumps(published(64)))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    for name in ("sam_model.blocks.0.attn.qkv.weight", "qwen2_model.model.model.layers.1.mlp.up_proj.weight"):
        assert f"model.{name}" in names
    assert {"model.view_seperator", "model.layers.1.mlp.experts.3.up_proj.weight"} <= names
    loaded = load_model(tmp_path, FAMILY, device="cpu", dtype="float32")
    expected = model.state_dict()
    found = loaded.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
