"""What step 1 writes: which layers are quantised, the same bytes each time, and one clear error for what cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_models import TINY, make_tiny_checkpoint
from tests.vlm.loading.conftest import Checkpoint
from vlm.config.model import ModelConfig, Part
from vlm.errors import ModelError
from vlm.families import FAMILIES
from vlm.loading.build import build_checkpoint
from vlm.loading.checkpoint import load_checkpoint
from vlm.processing import Processing


def build(name: str | Path, output_dir: Path, **settings: Any) -> Any:
    return build_checkpoint(ModelConfig(name=str(name), **settings), output_dir, device="cpu", dtype="float32")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("kept", [(), ("vision",), ("projector",), ("language",), ("vision", "projector")])
def test_exactly_the_layers_outside_the_kept_parts_are_quantised(
    sources: dict[str, Path], model_type: str, quantization: str, kept: tuple[Part, ...], tmp_path: Path
) -> None:
    import bitsandbytes as bnb

    summary = build(sources[model_type], tmp_path, quantization=quantization, keep_unquantized=kept)
    loaded = load_checkpoint(tmp_path, device="cpu")
    quantised_class = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}[quantization]
    family = FAMILIES[model_type]
    by_part: dict[str | None, set[type]] = {}
    for name, module in loaded.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            by_part.setdefault(family.part_of(name), set()).add(type(module))
    assert by_part == {
        part: {torch.nn.Linear if part == "head" or part in kept else quantised_class}
        for part in ("head", "projector", "vision", "language")
        if part != "projector" or TINY[model_type].projector
    }
    assert summary.keep_unquantized == tuple(sorted(kept))
    assert summary.num_quantized_modules == sum(
        isinstance(module, quantised_class) for module in loaded.model.modules()
    )


def test_numbered_layers_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    """`blocks.1` is the beginning of `blocks.10`: a skip list by prefixes without full names would take both."""
    from transformers import Qwen2VLConfig
    from transformers.quantizers.quantizers_utils import should_convert_module

    from vlm.loading.quantization import blueprint, quantization_config, unquantized_modules

    config = Qwen2VLConfig()
    settings = ModelConfig(quantization="nf4", keep_unquantized=("vision",))
    family = FAMILIES["qwen2_vl"]
    config.text_config.num_hidden_layers, config.vision_config.depth = 2, 12
    model = blueprint(family, config)
    skipped = unquantized_modules(model, family, settings)
    quantization = quantization_config(settings, skipped, torch.float32)
    assert quantization is not None
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    left = [name for name in linear if should_convert_module(name, quantization.llm_int8_skip_modules)]
    assert sorted(left) == sorted(name for name in linear if family.part_of(name) in ("language", "projector"))
    assert len(skipped) == 12 * 4 + 1


@pytest.mark.parametrize("double", [True, False])
def test_double_quantisation(sources: dict[str, Path], tmp_path: Path, double: bool) -> None:
    build(sources["qwen2_5_vl"], tmp_path, quantization="nf4", double_quantization=double)
    loaded = load_checkpoint(tmp_path, device="cpu")
    assert loaded.model.model.language_model.layers[0].mlp.up_proj.weight.quant_state.nested is double


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_the_same_bytes_from_another_place(
    sources: dict[str, Path], checkpoint: Checkpoint, model_type: str, quantization: Any, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere" / model_type
    shutil.copytree(sources[model_type], moved)
    build(moved, tmp_path / "out", quantization=quantization)
    assert content(tmp_path / "out") == content(checkpoint(model_type, quantization))
    text = b"".join(bytes_ for name, bytes_ in content(tmp_path / "out").items() if name.endswith(".json"))
    assert str(tmp_path).encode() not in text


def test_the_description(checkpoint: Checkpoint, sources: dict[str, Path], model_type: str) -> None:
    description = json.loads((checkpoint(model_type, "nf4") / "checkpoint.json").read_text())
    num_parameters = description.pop("num_parameters")
    assert description == {
        "family": model_type,
        "source": model_type,
        "quantization": "nf4",
        "double_quantization": True,
        "keep_unquantized": [],
        "dtype": "float32",
        "num_quantized_modules": TINY[model_type].num_linear_layers,
        "unquantized_experts": list(TINY[model_type].language_experts),
    }
    from safetensors.torch import load_file

    assert num_parameters == sum(
        tensor.numel() for tensor in load_file(sources[model_type] / "model.safetensors").values()
    )


def test_the_processor_does_not_depend_on_the_quantisation(
    checkpoint: Checkpoint, sources: dict[str, Path], model_type: str
) -> None:
    """Step 3's key holds the processor's content, so that another quantisation reuses the dataset."""
    processors = [
        content(checkpoint(model_type, quantization) / "processor") for quantization in ("nf4", "int8", "none")
    ]
    assert processors[0] == processors[1] == processors[2]
    assert Processing.from_dir(checkpoint(model_type, "nf4") / "processor").context_length_tokens == 4096


def test_without_quantisation_weights_are_stored_in_the_asked_for_precision(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    settings = ModelConfig(name=str(sources["qwen2_vl"]), quantization="none")
    build_checkpoint(settings, tmp_path, device="cpu", dtype="bfloat16")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    source = load_file(sources["qwen2_vl"] / "model.safetensors")
    assert {name: tensor.to(torch.bfloat16) for name, tensor in source.items()}.keys() == stored.keys()
    assert all(torch.equal(stored[name], tensor.to(torch.bfloat16)) for name, tensor in source.items())


def test_tied_embeddings(tmp_path: Path) -> None:
    """The small Qwen models share the head with the embeddings: stored once, and never quantised."""
    source = make_tiny_checkpoint("qwen2_5_vl", tmp_path / "tied", tie_word_embeddings=True)
    build(source, tmp_path / "out", quantization="nf4")
    loaded = load_checkpoint(tmp_path / "out", device="cpu")
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    untied = make_tiny_checkpoint("qwen2_5_vl", tmp_path / "untied")
    assert (
        build(untied, tmp_path / "out2").num_parameters - 1024 * 64
        == json.loads((tmp_path / "out" / "checkpoint.json").read_text())["num_parameters"]
    )


@pytest.mark.filterwarnings("ignore:.*we will NOT tie them")
@pytest.mark.parametrize("model_type", ["mistral3", "qwen2_vl"])
def test_a_head_of_its_own_under_a_config_that_ties_it(tmp_path: Path, model_type: str) -> None:
    """Mistral Small's config leaves the setting out, whose default in transformers is to tie."""
    source = make_tiny_checkpoint(model_type, tmp_path / "source")
    honest = build(source, tmp_path / "honest", quantization="none")
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    summary = build(source, tmp_path / "out", quantization="none")
    assert summary == honest
    weights = "model/model.safetensors"
    assert content(tmp_path / "out")[weights] == content(tmp_path / "honest")[weights]
    assert load_checkpoint(tmp_path / "out", device="cpu").model.config.tie_word_embeddings is False


def test_the_builtin_model(tmp_path: Path) -> None:
    summary = build("builtin-random", tmp_path, quantization="nf4")
    assert (summary.family, summary.source, summary.quantization) == ("qwen2_5_vl", "builtin-random", "nf4")
    assert load_checkpoint(tmp_path, device="cpu").model.config.text_config.num_hidden_layers == 4


def test_automatic_quantisation_is_settled_by_the_device(tmp_path: Path) -> None:
    assert build("builtin-random", tmp_path, quantization="auto").quantization == "none"


class TestCannotBeUsed:
    @pytest.fixture
    def source(self, sources: dict[str, Path], tmp_path: Path) -> Path:
        return Path(shutil.copytree(sources["qwen2_vl"], tmp_path / "source"))

    def refused(self, source: Path, tmp_path: Path, match: str) -> None:
        with pytest.raises(ModelError, match=match):
            build(source, tmp_path / "out")
        assert not (tmp_path / "out" / "checkpoint.json").exists()

    def test_only_pickled_weights(self, source: Path, tmp_path: Path) -> None:
        (source / "model.safetensors").rename(source / "pytorch_model.bin")
        self.refused(source, tmp_path, "only as 'pytorch_model.bin', a pickle")

    def test_no_weights(self, source: Path, tmp_path: Path) -> None:
        (source / "model.safetensors").unlink()
        self.refused(source, tmp_path, r"has no \*\.safetensors files")

    def test_truncated_weights(self, source: Path, tmp_path: Path) -> None:
        path = source / "model.safetensors"
        path.write_bytes(path.read_bytes()[:5000])
        self.refused(source, tmp_path, "no whole safetensors file")

    def test_a_shard_missing(self, source: Path, tmp_path: Path) -> None:
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
        self.refused(source, tmp_path, r"lacks 'model-2\.safetensors'")

    def test_an_unknown_architecture(self, source: Path, tmp_path: Path) -> None:
        (source / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
        self.refused(source, tmp_path, "'BertModel'.*use a checkpoint of one of .*'Qwen2VLForConditionalGeneration'")

    def test_no_config(self, source: Path, tmp_path: Path) -> None:
        (source / "config.json").unlink()
        self.refused(source, tmp_path, r"has no config\.json")

    def test_quantised_already(self, source: Path, tmp_path: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
        self.refused(source, tmp_path, r"is quantised already \(gptq\)")

    def test_a_tokenizer_whose_image_token_has_another_id(self, source: Path, tmp_path: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "image_token_id": 5}))
        self.refused(source, tmp_path, r"image token 5, the tokenizer's '<\|image_pad\|>' is 1022")

    def test_quantised_already_in_a_form_of_ours(self, source: Path, tmp_path: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        (source / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
        settings = ModelConfig(name=str(source), quantization="nf4")
        with pytest.raises(ModelError, match=r"set model\.quantization to 'none' to take it as it is stored"):
            build_checkpoint(settings, tmp_path / "out", device="cpu", dtype="float32")


def test_a_quantised_model_stays_as_it_is_stored(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tests.support.tiny_runs import make_checkpoint

    made = make_checkpoint("qwen2_vl", tmp_path, "nf4")
    folder = tmp_path / "as exported"
    shutil.copytree(made / "model", folder)
    shutil.copytree(made / "processor", folder, dirs_exist_ok=True)
    settings = ModelConfig(name=str(folder), quantization="none", precision="float32")
    summary = build_checkpoint(settings, tmp_path / "out", device="cpu", dtype="float32")
    assert (summary.quantization, summary.double_quantization) == ("nf4", True)
    assert summary.num_quantized_modules > 0
    before, after = (load_file(path / "model" / "model.safetensors") for path in (made, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
