import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vlm.export.test_export import PLAIN, make_adapter, run_export
from vlm.config import EvaluationConfig, GenerationConfig
from vlm.errors import ExportError
from vlm.export import verify_export
from vlm.export.reference import first_rows, make_reference
from vlm.export.verify import Verification
from vlm.families import FAMILIES, Video

pytestmark = pytest.mark.filterwarnings("ignore:.*quantization_config.*:UserWarning")


def in_this_process(request: dict[str, str]) -> dict[str, Any]:
    """What the fresh process does, without its start."""
    from dataclasses import asdict

    from vlm.export.roundtrip import Request, measure

    return {"measured": asdict(measure(Request(**request)))}


def reference_of(run: Any, adapter: Path, folder: Path, num_rows: int = 2) -> Path:
    generation = GenerationConfig(split="test", max_new_tokens=6)
    make_reference(run.loaded, adapter, run.dataset_dir, generation, num_rows, folder)
    return folder


def verify(kind: Any, run: Any, export_dir: Path, reference: Path, **settings: Any) -> Verification:
    settings = {"device": "cpu", "runner": in_this_process} | settings
    evaluation = EvaluationConfig()
    return verify_export(kind, export_dir, run.checkpoint_dir, run.dataset_dir, reference, evaluation, **settings)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_exports_of_every_family_pass(tiny_run: Callable, tmp_path: Path, model_type: str) -> None:
    run = tiny_run(model_type, "nf4")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    reference = reference_of(run, adapter, tmp_path / "reference")
    for kind in ("lora", "merged_16bit", "merged_4bit"):
        run_export(kind, run, adapter, tmp_path / kind)
        verification = verify(kind, run, tmp_path / kind, reference)
        assert verification.distance < verification.max_distance
        assert verification.num_rows == 2
        assert json.loads((tmp_path / kind / "verification.json").read_text()) == verification.to_json()
        assert "compared with the trained model on 2 held-out rows" in (tmp_path / kind / "README.md").read_text()
        if kind == "lora":
            assert verification.metric_value == verification.metric_reference


@pytest.fixture(scope="module")
def trained(tiny_run: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    folder = tmp_path_factory.mktemp("trained")
    run = tiny_run("qwen2_vl")
    adapter = make_adapter(run, folder / "adapter", PLAIN)
    return run, adapter, reference_of(run, adapter, folder / "reference")


def test_a_fresh_process_finds_the_same(trained: tuple[Any, Path, Path], tmp_path: Path) -> None:
    run, adapter, reference = trained
    run_export("merged_8bit", run, adapter, tmp_path / "out")
    here = verify("merged_8bit", run, tmp_path / "out", reference)
    assert verify("merged_8bit", run, tmp_path / "out", reference, runner=None) == here


def test_an_adapter_that_got_lost_is_noticed(trained: tuple[Any, Path, Path], tmp_path: Path) -> None:
    run, adapter, reference = trained
    run_export("lora", run, adapter, tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    # Under names that nothing has, which peft passes over with a warning.
    save_file({key.replace("q_proj", "p_proj"): tensor for key, tensor in tensors.items()}, path)
    with pytest.warns(UserWarning, match="missing adapter keys"), pytest.raises(ExportError, match="logits that are"):
        verify("lora", run, tmp_path / "lora", reference)


def test_a_small_change_that_got_lost_is_noticed(tiny_run: Callable, tmp_path: Path) -> None:
    """Smaller than 4 bits' own noise, so that the distance alone says nothing."""
    run = tiny_run("qwen2_vl", "nf4")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    tensors = load_file(adapter / "adapter_model.safetensors")
    nothing = tmp_path / "nothing"
    shutil.copytree(adapter, nothing)
    scale = {"adapter": 0.2, "nothing": 0.0}
    for folder, factor in ((adapter, scale["adapter"]), (nothing, scale["nothing"])):
        changed = {key: tensor * factor if "lora_B" in key else tensor for key, tensor in tensors.items()}
        save_file(changed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    reference = reference_of(run, adapter, tmp_path / "reference")
    run_export("merged_4bit", run, adapter, tmp_path / "right")
    assert verify("merged_4bit", run, tmp_path / "right", reference).distance < 0.5
    run_export("merged_4bit", run, nothing, tmp_path / "wrong")
    with pytest.raises(ExportError, match="of what training changed"):
        verify("merged_4bit", run, tmp_path / "wrong", reference)


def test_a_damaged_weight_is_noticed(trained: tuple[Any, Path, Path], tmp_path: Path) -> None:
    run, adapter, reference = trained
    run_export("merged_16bit", run, adapter, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("layers.1.mlp.down_proj.weight"))
    save_file(tensors | {key: tensors[key].roll(1, 0)}, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"logits that are 0\.\d+ away .* allowed 0\.001"):
        verify("merged_16bit", run, tmp_path / "out", reference)
    assert not (tmp_path / "out" / "verification.json").exists()
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="1 missing keys"):
        verify("merged_16bit", run, tmp_path / "out", reference)


def test_another_metric_is_noticed(trained: tuple[Any, Path, Path], tmp_path: Path) -> None:
    run, adapter, reference = trained
    run_export("lora", run, adapter, tmp_path / "lora")
    right = json.loads((reference / "reference.json").read_text())

    def other_words(request: dict[str, str]) -> dict[str, Any]:
        rows = list(range(len(right["ids"])))
        return {"measured": {"distance": 0.0, "change": 1.0, "kept": 1.0, "rows": rows, "answers": right["targets"]}}

    with pytest.raises(ExportError, match=r"Character error rate 0\.0000, the trained model"):
        verify("lora", run, tmp_path / "lora", reference, runner=other_words)


def test_another_tokenizer_is_noticed(trained: tuple[Any, Path, Path], tmp_path: Path) -> None:
    run, adapter, reference = trained
    run_export("lora", run, adapter, tmp_path / "lora")
    template = tmp_path / "lora" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|vision_end|>", ""))
    with pytest.raises(ExportError, match="other tokens"):
        verify("lora", run, tmp_path / "lora", reference)


def test_without_a_row_of_images_llama_cpp_has_nothing_to_run(
    trained: tuple[Any, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm.export import roundtrip

    run, _, reference = trained
    film = Video(np.zeros((2, 56, 84, 3), np.uint8), 1.0)
    rows = [dataclasses.replace(row, images=[film]) for row in first_rows(run.dataset_dir, "test", 2)]
    monkeypatch.setattr(roundtrip, "first_rows", lambda *_: rows)
    with pytest.raises(ExportError, match=r"held-out rows has a video.* set export.verify to false"):
        verify("gguf", run, tmp_path, reference)


def test_a_process_that_dies_is_one_error(trained: tuple[Any, Path, Path], tmp_path: Path) -> None:
    run, adapter, reference = trained
    run_export("lora", run, adapter, tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ExportError, match="the export 'lora' does not load again"):
        verify("lora", run, tmp_path / "lora", reference, runner=None)


def test_the_reference_is_bounded(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_vl")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    folder = reference_of(run, adapter, tmp_path / "reference", num_rows=64)
    tensors = load_file(folder / "reference.safetensors")
    assert len(tensors) == 2 * 5  # the split has five rows
    assert all(tensor.dtype == torch.float32 and tensor.shape[0] <= 64 for tensor in tensors.values())
