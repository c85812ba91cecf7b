"""What other programs read of an export: its layout is that of a stock model, and stock pipelines run it."""

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.support.tiny_models import TINY, tiny_image
from tests.vlm.export.test_export import PLAIN, make_adapter, run_export
from vlm.export.merging import MergedGroup, MergedModel
from vlm.families import FAMILIES

# Families whose stock processors run a pipeline without torchvision.
PIPELINES = ("qwen2_vl", "qwen2_5_vl", "mllama", "pixtral", "mistral3")


def shapes_in(folder: Path) -> dict[str, tuple[list[int], str]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, a file, not a dict
                piece = file.get_slice(key)
                found[key] = (piece.get_shape(), piece.get_dtype())
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_shapes_and_config_are_those_of_a_stock_model(
    tiny_run: Callable, tmp_path: Path, model_type: str
) -> None:
    run = tiny_run(model_type)
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    run_export("merged_16bit", run, adapter, tmp_path / "merged")
    TINY[model_type].build(False).save_pretrained(tmp_path / "stock")
    assert shapes_in(tmp_path / "merged") == shapes_in(tmp_path / "stock")
    merged, stock = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("merged", "stock"))
    for name in ("architectures", "model_type", "tie_word_embeddings"):
        assert merged.get(name) == stock.get(name)
    for section in ("text_config", "vision_config"):
        # Where files on the Hub leave defaults out, or name others, the export keeps theirs.
        differing = {name for name in stock[section] if merged[section].get(name) != stock[section][name]}
        assert differing <= {"dtype", "_name_or_path"}, section


@pytest.mark.parametrize("model_type", PIPELINES)
def test_a_stock_pipeline_answers(tiny_run: Callable, tmp_path: Path, model_type: str) -> None:
    import transformers
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    run = tiny_run(model_type)
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    run_export("merged_16bit", run, adapter, tmp_path / "merged")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", local_files_only=True)
    processor = TINY[model_type].stock_processor(tmp_path / "merged")
    pipeline = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    image = Image.fromarray(tiny_image(56, 84))
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Read."}]}]
    answer = pipeline(text=messages, return_full_text=False, generate_kwargs={"max_new_tokens": 3, "do_sample": False})
    assert isinstance(answer[0]["generated_text"], str)


@pytest.mark.parametrize("kind", ["merged_16bit", "merged_8bit", "merged_4bit", "gguf"])
def test_weights_go_through_one_by_one(
    tiny_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run = tiny_run("qwen2_vl", "nf4")
    adapter = make_adapter(run, tmp_path / "adapter", PLAIN)
    right = MergedModel.groups
    alive: list[tuple[weakref.ref[torch.Tensor], int]] = []
    kept: list[int] = []
    largest = 0

    def groups(self: MergedModel) -> Iterator[MergedGroup]:
        nonlocal largest
        for group in right(self):
            kept.append(sum(size for ref, size in alive if ref() is not None))
            for tensor in group.tensors.values():
                alive.append((weakref.ref(tensor), tensor.nbytes))
                largest = max(largest, tensor.nbytes)
            yield group
            del group

    monkeypatch.setattr(MergedModel, "groups", groups)
    run_export(kind, run, adapter, tmp_path / "out", max_shard_size_mb=1)
    description = json.loads((run.checkpoint_dir / "checkpoint.json").read_text())
    shard = 0 if kind == "gguf" else 1_000_000
    # A file that fills up, and the weight that is being worked on; all weights together, in float32, are larger.
    assert max(kept) <= max(shard, largest) + largest < 4 * description["num_parameters"]
