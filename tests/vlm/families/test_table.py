"""Every row's patterns against the modules of a real model of the family, and the way from a config to a row."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_models import TINY, make_tiny_checkpoint
from vlm.errors import ModelError
from vlm.families import FAMILIES, Family, context_length_tokens, family_by_name, family_for_config, text_config
from vlm.families.classes import transformers_class
from vlm.loading.model_config import model_config
from vlm.loading.quantization import blueprint


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(family.model_type, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(family: Family, folder: Path) -> Any:
    return blueprint(family, model_config(folder, family))


def names_matching(model: Any, pattern: str) -> list[str]:
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]


def test_each_linear_layer_is_in_exactly_one_group(family: Family, model: Any) -> None:
    groups = (
        family.language_attention,
        family.language_mlp,
        family.vision_attention,
        family.vision_mlp,
        family.projector,
    )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and family.part_of(name) != "head":
            assert sum(re.fullmatch(pattern, name) is not None for pattern in groups) == 1, name


def test_groups_hold_linear_layers_of_their_part(family: Family, model: Any) -> None:
    modules = dict(model.named_modules())
    for pattern, part in (
        (family.language_attention, "language"),
        (family.language_mlp, "language"),
        (family.vision_attention, "vision"),
        (family.vision_mlp, "vision"),
        (family.projector, "projector"),
    ):
        found = names_matching(model, pattern)
        assert found
        assert {type(modules[name]) for name in found} == {torch.nn.Linear}
        assert {family.part_of(name) for name in found} == {part}


def test_layers(family: Family, model: Any) -> None:
    assert len(names_matching(model, family.language_layer)) == model.config.text_config.num_hidden_layers
    vision = model.config.vision_config
    if hasattr(vision, "sam_config"):  # two encoders, one behind the other
        depth = vision.sam_config.num_hidden_layers + vision.encoder_config.num_hidden_layers
    else:
        depth = getattr(vision, "depth", None) or vision.num_hidden_layers + getattr(vision, "num_global_layers", 0)
    assert len(names_matching(model, family.vision_layer)) == depth


def test_every_parameter_is_in_a_part(family: Family, model: Any) -> None:
    parts = {family.part_of(name) for name, _ in model.named_parameters()}
    assert parts == {"head", "projector", "vision", "language"}


def test_part_of_an_outside_name(family: Family) -> None:
    assert family.part_of("model.visualiser.blocks.0") is None
    assert family.part_of("model.multi_modal_projectors") is None
    assert family.part_of(TINY[family.model_type].language_layers[0]) == "language"


def test_its_config_leads_to_it(family: Family, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert family_for_config(config) is family
    del config["architectures"]
    if config["model_type"] in family.config_types:
        assert family_for_config(config) is family
    else:  # a type that other models use too says nothing
        with pytest.raises(ModelError, match="no architecture"):
            family_for_config(config)
    assert family_by_name(family.model_type) is family
    assert text_config(config)["hidden_size"] == 64
    assert context_length_tokens(config) == 4096


def test_media_tokens_hold_the_image_token(family: Family) -> None:
    assert family.image_token in family.media_tokens


def test_architectures_win_over_the_model_type() -> None:
    """Models that share a model_type differ by architecture."""
    config = {"model_type": "qwen2_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    assert family_for_config(config).model_type == "qwen2_5_vl"


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "architecture 'BertModel' and model_type 'bert'"),
        ({"model_type": "qwen2_vl", "architectures": ["Other"]}, "architecture 'Other' and model_type 'qwen2_vl'"),
        ({"model_type": "bert"}, "no architecture and model_type 'bert'"),
        ({}, "no architecture and model_type None"),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"model_type": "clip_vision_model"}},
            "architecture 'LlavaForConditionalGeneration' and model_type None with a 'clip_vision_model' vision tower",
        ),
        ({"model_type": "llava", "vision_config": {}}, "no architecture and model_type 'llava'"),
    ],
)
def test_an_unknown_architecture_lists_the_known(config: dict[str, Any], found: str) -> None:
    with pytest.raises(ModelError, match=f"{found}.*'Qwen2VLForConditionalGeneration'"):
        family_for_config(config)


def test_an_unknown_name_lists_near_ones() -> None:
    with pytest.raises(ModelError, match=r"'qwen2_5vl' is no family.*Did you mean 'qwen2_5_vl'"):
        family_by_name("qwen2_5vl")


def test_context_length_of_a_flat_config_and_of_none() -> None:
    assert context_length_tokens({"max_position_embeddings": 128}) == 128
    assert context_length_tokens({"text_config": {}, "max_position_embeddings": 64}) == 64
    assert context_length_tokens({}) is None


def test_a_family_that_the_installed_transformers_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    family = dataclasses.replace(FAMILIES["qwen2_vl"], model_class="Qwen9VLForConditionalGeneration")
    with pytest.raises(
        ModelError, match=f"'Qwen9VLForConditionalGeneration'.* transformers {transformers.__version__} does not have"
    ):
        transformers_class(family, family.model_class)
