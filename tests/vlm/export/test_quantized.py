import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_models import TINY
from tests.vlm.export.test_export import PLAIN, RICH, logits_alone, make_adapter, make_fully_trained, run_export
from vlm.config import LoraConfig
from vlm.errors import ExportError
from vlm.export import export
from vlm.families import FAMILIES

KINDS: dict[int, Literal["merged_4bit", "merged_8bit"]] = {4: "merged_4bit", 8: "merged_8bit"}


def quantised_by_transformers(merged: Path, bits: int, skipped: list[str]) -> Any:
    """The stock way: the 16-bit export, quantised while it is loaded."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    config = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skipped,
        )
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    )
    return AutoModelForImageTextToText.from_pretrained(
        merged, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}, local_files_only=True
    ).eval()


def plain_load(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", device_map={"": "cpu"}, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_what_transformers_makes_of_the_merged_model(
    tiny_run: Callable, tmp_path: Path, model_type: str, bits: int
) -> None:
    run = tiny_run(model_type, "nf4" if bits == 4 else "none")
    lora = TINY[model_type].possible(RICH if bits == 4 else PLAIN)
    adapter = make_adapter(run, tmp_path / "adapter", lora)
    run_export("merged_16bit", run, adapter, tmp_path / "merged")
    summary = run_export(KINDS[bits], run, adapter, tmp_path / "quantised", max_shard_size_mb=1)
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    skipped = config["quantization_config"]["llm_int8_skip_modules"]
    assert "lm_head" in skipped
    expected = quantised_by_transformers(tmp_path / "merged", bits, skipped)
    found = plain_load(tmp_path / "quantised")
    expected_state, found_state = expected.state_dict(), found.state_dict()
    assert found_state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        # Both round the same float32 matrix with the same code.
        assert torch.equal(found_state[name], tensor), name
    kinds = {type(module).__name__ for module in found.modules()}
    assert ("Linear4bit" if bits == 4 else "Linear8bitLt") in kinds
    assert summary.num_adapted_modules == json.loads((adapter / "targets.json").read_text())["num_targets"]
    assert f"merged-{bits}bit" in (tmp_path / "quantised" / "README.md").read_text()
    # No file name of the drafts is left, and the index names every file.
    weights = {path.name for path in (tmp_path / "quantised").glob("*.safetensors")}
    index = tmp_path / "quantised" / "model.safetensors.index.json"
    assert weights == (
        set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    )


def test_16_bit_models_are_quantised_from_16_bit_weights(tiny_run: Callable, tmp_path: Path) -> None:
    """Without a forward pass, which many CPUs do not have in bfloat16."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    run = tiny_run("qwen2_vl")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    shutil.copytree(run.checkpoint_dir, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    for kind in ("merged_16bit", *KINDS.values(), "gguf"):
        export(kind, tmp_path / "checkpoint", adapter, tmp_path / kind, max_shard_size_mb=1, device="cpu")
    for bits, kind in KINDS.items():
        skipped = json.loads((tmp_path / kind / "config.json").read_text())["quantization_config"]
        assert skipped["bnb_4bit_compute_dtype"] == ("bfloat16" if bits == 4 else "float32")
        config = BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=skipped["llm_int8_skip_modules"],
        )
        expected = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "merged_16bit",
            dtype=torch.bfloat16,
            quantization_config=config,
            device_map={"": "cpu"},
            local_files_only=True,
        ).state_dict()
        found = plain_load(tmp_path / kind).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_quantising_after_the_merge_keeps_the_update(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_vl")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    run_export("merged_16bit", run, adapter, tmp_path / "merged")
    merged = plain_load(tmp_path / "merged")
    expected = logits_alone(merged, run, [0, 1])
    base = logits_alone(run.loaded.model, run, [0, 1])
    for bits, kind in KINDS.items():
        run_export(kind, run, adapter, tmp_path / kind)
        found = logits_alone(plain_load(tmp_path / kind), run, [0, 1])
        # NF4 moves a weight of unit variance by 0.09 on average, LLM.int8() by 0.01; a dozen layers add up.
        assert (found - expected).norm() < {4: 0.5, 8: 0.06}[bits] * expected.norm()
        assert (found - expected).norm() < (base - expected).norm()


def test_parts_kept_in_16_bit_and_modules_trained_whole_stay_so(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    whole = "model.visual.merger.mlp.0"
    adapter = make_adapter(
        run, tmp_path / "adapter", LoraConfig(rank=2, target_modules=("q_proj",), modules_to_save=(whole,))
    )
    run_export("merged_4bit", run, adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head", whole]
    assert load_file(tmp_path / "out" / "model.safetensors")["visual.merger.mlp.0.weight"].dtype == torch.float32


def test_fully_trained_weights_are_quantised(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_vl")
    adapter = make_fully_trained(run, tmp_path / "adapter", LoraConfig(full_finetuning=("language",)))
    run_export("merged_8bit", run, adapter, tmp_path / "out")
    trained = load_file(adapter / "adapter_model.safetensors")
    state = plain_load(tmp_path / "out").state_dict()
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    restored = state[name].float() * state[name.replace("weight", "SCB")][:, None] / 127
    # Half a step of a 127th of the row's largest, which is below 6 standard deviations.
    torch.testing.assert_close(restored, trained[name], rtol=0, atol=float(trained[name].abs().max()) / 127)


def test_weights_that_quantise_wrongly_are_refused(
    tiny_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes import functional

    run = tiny_run("qwen2_vl")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    right = functional.quantize_4bit

    def wrong(weight: torch.Tensor, **options: Any) -> Any:
        return right(weight.flip(0), **options)

    monkeypatch.setattr(functional, "quantize_4bit", wrong)
    with pytest.raises(ExportError, match="moved a weight by"):
        run_export("merged_4bit", run, adapter, tmp_path / "out")
