"""GGUF files against readers that are not the writer.

These are the gguf package, transformers' own GGUF loader (language model), and a twin of llama.cpp's vision graphs.
"""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.clip_twin import pixtral_features, qwen_features, read_gguf
from tests.vlm.export.test_export import PLAIN, make_adapter, make_fully_trained, run_export
from vlm.config import LoraConfig
from vlm.errors import ExportError
from vlm.export.gguf.metadata import pre_tokenizer
from vlm.export.gguf.support import check_model, check_supported
from vlm.families import FAMILIES
from vlm.families.gguf import qwen_metadata

MODELS = ("qwen2_vl", "builtin", "pixtral", "mistral3")
WINDOW = r"window_size 56 and llama\.cpp computes with 112"
REFUSED = [name for name, family in FAMILIES.items() if family.gguf is None]


@pytest.fixture(scope="module")
def exported(gguf_run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """The f16 export of a model and the live merged model."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            from transformers import AutoModelForImageTextToText

            folder = tmp_path_factory.mktemp(name)
            run = gguf_run(name)
            adapter = make_adapter(run, folder / "adapter", PLAIN)
            run_export("gguf", run, adapter, folder / "gguf", gguf_type="f16")
            run_export("merged_16bit", run, adapter, folder / "merged")
            merged = AutoModelForImageTextToText.from_pretrained(folder / "merged", local_files_only=True).eval()
            made[name] = folder / "gguf", merged
        return made[name]

    return get


def own_text_logits(merged: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return merged(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("name", MODELS)
def test_the_language_model_is_the_merged_one(
    exported: Callable, gguf_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder, merged = exported(name)
    family = gguf_run(name).loaded.family
    if family.gguf.architecture == "qwen2vl":
        # transformers reads no qwen2vl files; on text alone, it is qwen2.
        layout = dataclasses.replace(family.gguf, architecture="qwen2")
        monkeypatch.setattr("vlm.export.gguf.design.check_supported", lambda family: layout)
        run = gguf_run(name)
        run_export("gguf", run, make_adapter(run, tmp_path / "adapter", PLAIN), tmp_path / "out", gguf_type="f16")
        folder = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model-f16.gguf", dtype=torch.float32).eval()
    ids = torch.randint(5, 250, (1, 12), generator=torch.Generator().manual_seed(0))
    found, expected = own_text_logits(model, ids), own_text_logits(merged, ids)
    # Matrices were rounded to float16 (2^-11 of each weight), which a few layers add up.
    assert (found - expected).norm() < 3e-3 * expected.norm()


@pytest.mark.parametrize("name", MODELS)
def test_the_vision_tower_is_the_merged_one(exported: Callable, gguf_run: Callable, name: str) -> None:
    folder, merged = exported(name)
    tensors, head = read_gguf(folder / "mmproj-f16.gguf")
    processing = gguf_run(name).loaded.processing
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (84, 112, 3), dtype=torch.uint8, generator=generator).numpy()
    inputs = processing.pixel_inputs([[image]])
    seen = []
    is_qwen = head["clip.projector_type"].startswith("qwen")
    projector = merged.model.visual.merger if is_qwen else merged.model.multi_modal_projector
    hook = projector.register_forward_hook(lambda module, arguments, output: seen.append(output))
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    ids = torch.tensor([processing.encode(messages, [(84, 112)]).input_ids])
    with torch.no_grad():
        merged(input_ids=ids, attention_mask=torch.ones_like(ids), **processing.model_inputs(ids, inputs))
    hook.remove()
    if is_qwen:
        _, height, width = inputs["image_grid_thw"][0].tolist()
        found = qwen_features(tensors, head, inputs["pixel_values"], (height, width))
    else:
        found = pixtral_features(tensors, head, inputs["pixel_values"])
    expected = seen[0].reshape(found.shape)
    # Matrices in float16, as above.
    assert (found - expected).norm() < 3e-3 * expected.norm()
    assert head["clip.vision.projection_dim"] == found.shape[-1]


@pytest.mark.parametrize("name", MODELS)
def test_names_are_those_of_the_gguf_package(exported: Callable, gguf_run: Callable, name: str) -> None:
    """The package carries llama.cpp's own tables of names."""
    import gguf

    folder, merged = exported(name)
    by_name = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    tensors, head = read_gguf(folder / "model-f16.gguf")
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[by_name[head["general.architecture"]]]}
    blocks = head[f"{head['general.architecture']}.block_count"]
    names = {pattern.format(bid=bid) for pattern in known for bid in range(blocks)}
    assert {tensor.rpartition(".")[0] for tensor in tensors} <= names
    tensors, head = read_gguf(folder / "mmproj-f16.gguf")
    assert head["general.architecture"] == "clip"
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.MMPROJ]}
    names = {pattern.format(bid=bid) for pattern in known for bid in range(8)}
    stems = {re.sub(r"\.(weight|bias)(\.1)?$", "", tensor) for tensor in tensors}
    assert stems <= names
    assert head["clip.projector_type"] in vars(gguf.VisionProjectorType).values()
    break_id = gguf_run(name).loaded.processing.tokenizer.get_vocab().get("[IMG_BREAK]")
    assert ("v.token_embd.img_break" in tensors) == (break_id is not None)
    if break_id is not None:
        row = merged.model.language_model.embed_tokens.weight[break_id]
        torch.testing.assert_close(tensors["v.token_embd.img_break"], row.detach(), rtol=0, atol=0)


def test_the_tokenizer_and_the_head(exported: Callable, gguf_run: Callable) -> None:
    folder, merged = exported("qwen2_vl")
    _, head = read_gguf(folder / "model-f16.gguf")
    tokenizer = gguf_run("qwen2_vl").loaded.processing.tokenizer
    text = merged.config.text_config
    assert len(head["tokenizer.ggml.tokens"]) == text.vocab_size
    for token in ("<|im_start|>", "<|im_end|>", "<|image_pad|>"):
        number = tokenizer.convert_tokens_to_ids(token)
        assert head["tokenizer.ggml.tokens"][number] == token
        assert head["tokenizer.ggml.token_type"][number] == 3
    assert head["tokenizer.ggml.tokens"][head["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert (head["tokenizer.ggml.model"], head["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert head["tokenizer.ggml.add_bos_token"] is False
    assert "<|im_start|>" in head["tokenizer.chat_template"]
    # Merges build each ordinary token of more than one letter.
    pieces = {merge.replace(" ", "") for merge in head["tokenizer.ggml.merges"]}
    kinds = zip(head["tokenizer.ggml.tokens"], head["tokenizer.ggml.token_type"], strict=True)
    assert all(token in pieces for token, kind in kinds if kind == 1 and len(token) > 1)
    assert head["qwen2vl.rope.dimension_sections"] == [*text.rope_parameters["mrope_section"], 0]
    assert head["qwen2vl.rope.freq_base"] == text.rope_parameters["rope_theta"]
    assert head["general.file_type"] == 1
    _, head = read_gguf(folder / "mmproj-f16.gguf")
    assert head["clip.vision.image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    _, head = read_gguf(exported("builtin")[0] / "mmproj-f16.gguf")
    assert (head["clip.vision.n_wa_pattern"], head["clip.use_silu"]) == (2, True)
    _, head = read_gguf(exported("mistral3")[0] / "mmproj-f16.gguf")
    assert head["clip.vision.spatial_merge_size"] == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qwen2_vl",
            "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n",
        ),
        (
            "pixtral",
            "{{ if .System }}[SYSTEM_PROMPT]{{ .System }}[/SYSTEM_PROMPT]{{ end }}[INST]{{ .Prompt }}[/INST]{{ .Response }}</s>",
        ),
    ],
)
def test_the_modelfile_has_the_models_own_template(exported: Callable, name: str, expected: str) -> None:
    text = (exported(name)[0] / "Modelfile").read_text()
    template = text.split('"""')[1]
    assert template == expected
    assert text.startswith("FROM ./model-f16.gguf\nFROM ./mmproj-f16.gguf\n")
    ends = {"qwen2_vl": ["<|im_end|>", "<|endoftext|>"], "pixtral": ["</s>"]}[name]
    assert [line for line in text.splitlines() if "stop" in line] == [f'PARAMETER stop "{end}"' for end in ends]
    assert "PARAMETER temperature 0" in text
    # The tiny processors' limits: areas for Qwen2-VL, a longest edge for Pixtral.
    limits = {"qwen2_vl": (4, 256), "pixtral": (1, 576)}[name]
    assert (
        "`--image-min-tokens {} --image-max-tokens {}`".format(*limits) in (exported(name)[0] / "README.md").read_text()
    )


@pytest.mark.parametrize("gguf_type", ["bf16", "q8_0", "q4_0", "q5_1"])
def test_quantised_types(gguf_run: Callable, tmp_path: Path, gguf_type: str) -> None:
    import gguf

    run = gguf_run("pixtral")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    run_export("gguf", run, adapter, tmp_path / "out", gguf_type=gguf_type)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / f"model-{gguf_type}.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == gguf_type.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == {"q4_0": "Q8_0", "q5_1": "Q8_0"}.get(gguf_type, gguf_type.upper())
    vision = "bf16" if gguf_type == "bf16" else "f16"
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / f"mmproj-{vision}.gguf").tensors}
    assert kinds["v.patch_embd.weight"] == ("F32" if gguf_type == "bf16" else "F16")
    assert (tmp_path / "out" / "README.md").exists()


def test_what_was_trained_whole_is_exported(gguf_run: Callable, tmp_path: Path) -> None:
    run = gguf_run("qwen2_vl")
    adapter = make_fully_trained(run, tmp_path / "adapter", LoraConfig(full_finetuning=("projector",)))
    run_export("gguf", run, adapter, tmp_path / "out", gguf_type="f16")
    from safetensors.torch import load_file

    tensors, _ = read_gguf(tmp_path / "out" / "mmproj-f16.gguf")
    trained = load_file(adapter / "adapter_model.safetensors")
    torch.testing.assert_close(
        tensors["mm.0.weight"], trained["model.visual.merger.mlp.0.weight"], atol=2**-24, rtol=2**-11
    )


def test_a_wrong_tensor_is_caught_after_writing(
    gguf_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    run = gguf_run("qwen2_vl")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    right = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda values, kind: right(values[::-1].copy(), kind))
    with pytest.raises(ExportError, match=r"further from the merged weight than \w+ can be"):
        run_export("gguf", run, adapter, tmp_path / "out")


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_that_llama_cpp_does_not_run_are_refused(tiny_run: Callable, tmp_path: Path, model_type: str) -> None:
    run = tiny_run(model_type)
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    with pytest.raises(ExportError, match=r"cannot be written for llama.cpp here, only .*Qwen2-VL.* take 'gguf' out"):
        run_export("gguf", run, adapter, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_settings_that_llama_cpp_has_built_in_otherwise_are_refused(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    with pytest.raises(ExportError, match=WINDOW):
        run_export("gguf", run, adapter, tmp_path / "out")
    # And without an adapter, before there is one.
    with pytest.raises(ExportError, match=WINDOW):
        check_model(run.loaded.family, run.checkpoint_dir / "model", run.checkpoint_dir / "processor")


@pytest.mark.parametrize("name", MODELS)
def test_models_that_can_be_written_pass_the_check(gguf_run: Callable, name: str) -> None:
    run = gguf_run(name)
    check_model(run.loaded.family, run.checkpoint_dir / "model", run.checkpoint_dir / "processor")


def test_the_rule_for_words_is_the_tokenizers_own(gguf_run: Callable) -> None:
    layout = FAMILIES["mistral3"].gguf
    assert layout is not None
    tokenizer = gguf_run("mistral3").loaded.processing.tokenizer
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    # The tests' tokenizer cuts text as Qwen's does.
    assert pre_tokenizer(layout, description) == "qwen2"
    split = next(step for step in description["pre_tokenizer"]["pretokenizers"] if step["type"] == "Split")
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    assert pre_tokenizer(layout, description) == "llama-bpe"
    split["pattern"]["Regex"] = r"\S+"
    assert pre_tokenizer(layout, description) == "tekken"


def qwen_config(**vision: Any) -> dict[str, Any]:
    windows = {"window_size": 112, "fullatt_block_indexes": [1, 3], "intermediate_size": 128, "hidden_act": "silu"}
    sizes = {"depth": 4, "num_heads": 2, "hidden_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return {"vision_config": sizes | windows | vision}


@pytest.mark.parametrize(("full", "period"), [([1, 3], 2), ([3], 4), ([0, 1, 2, 3], 0), ([], 5)])
def test_layers_with_full_attention(full: list[int], period: int) -> None:
    """0 switches llama.cpp's windows off; else each layer whose number, from 1, the period divides has full attention."""
    assert qwen_metadata(qwen_config(fullatt_block_indexes=full))["clip.vision.n_wa_pattern"] == period


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"fullatt_block_indexes": [1, 2]},
            r"layers \[1, 2\] have full attention, and llama.cpp takes every 2-th of 4",
        ),
        ({"spatial_merge_size": 4}, "spatial_merge_size 4 and llama.cpp computes with 2"),
        ({"intermediate_size": 64}, r"as wide as its blocks \(64\), and llama.cpp then swaps them"),
    ],
)
def test_towers_that_llama_cpp_would_compute_otherwise_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        qwen_metadata(qwen_config(**changed))


def test_a_missing_package_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'vision-finetune\[gguf\]'"):
        check_supported(FAMILIES["qwen2_vl"])


def test_the_same_export_gives_the_same_bytes(gguf_run: Callable, tmp_path: Path) -> None:
    run = gguf_run("qwen2_vl")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    summaries = [run_export("gguf", run, adapter, tmp_path / name) for name in ("first", "second")]
    assert summaries[0] == summaries[1]
    assert summaries[0].num_adapted_modules == json.loads((adapter / "targets.json").read_text())["num_targets"]
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
