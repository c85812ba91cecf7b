import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny_models import TINY
from tests.support.tiny_runs import batch_of
from vlm.data.prepared import PreparedDataset
from vlm.families import FAMILIES
from vlm.families.pixels import PixelBytes, finished
from vlm.training.collator import IGNORED, VisionDataCollator


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("train_on_prompts", [False, True])
def test_labels_against_a_slow_reference(tiny_run: Callable, model_type: str, train_on_prompts: bool) -> None:
    run = tiny_run(model_type)
    rows = [PreparedDataset(run.dataset_dir, "train")[number] for number in range(4)]
    collator = VisionDataCollator(run.loaded.processing, train_on_prompts=train_on_prompts)
    batch = collator(rows)
    tokenizer, facts = run.loaded.processing.tokenizer, TINY[model_type]
    length = max(len(row.input_ids) for row in rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (4, length)
    for number, row in enumerate(rows):
        ids = row.input_ids.tolist()
        # By words, not by spans: behind the last start of an answer, everything up to the token that ends it counts.
        words = tokenizer.convert_ids_to_tokens(ids)
        start = tokenizer.tokenize(facts.answer_start)
        first = max(end for end in range(len(words)) if words[end - len(start) : end] == start)
        last = len(words) - words[::-1].index(facts.end_of_turn) - 1
        answer = range(first, last + 1)
        assert tokenizer.decode(ids[first:last]) == facts.answer_lead + row.target
        for position in range(length):
            label = int(batch["labels"][number, position])
            if position >= len(ids):
                assert label == IGNORED
                assert batch["attention_mask"][number, position] == 0
                assert batch["input_ids"][number, position] == run.loaded.processing.pad_token_id
                continue
            assert batch["input_ids"][number, position] == ids[position]
            learnt = words[position] not in facts.image_tokens if train_on_prompts else position in answer
            assert label == (ids[position] if learnt else IGNORED), (number, position, words[position])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_image_tensors_follow_the_rows(tiny_run: Callable, model_type: str) -> None:
    run = tiny_run(model_type)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 2, 1])  # one image, none, two
    if model_type == "mllama":
        assert batch["pixel_values"].shape == (3, 2, 4, 3, 56, 56)
        assert batch["aspect_ratio_ids"].tolist() == [[2, 0], [0, 0], [1, 3]]  # 1 x 2 tiles; none; 1 x 1 and 1 x 3
        assert batch["cross_attention_mask"].shape == (*batch["input_ids"].shape, 2, 4)
    elif model_type in ("pixtral", "mistral3", "lighton_ocr"):
        assert batch["image_sizes"].tolist() == [[56, 84], [56, 56], [56, 140]]
        assert batch["pixel_values"].shape == (3, 3, 56, 140)
    elif "deepseek" in model_type:
        assert batch["pixel_values"].shape == (3, 3, 256, 256)
        assert batch["num_local_patches"] == [0, 0, 0 if model_type == "deepseek_ocr2" else 2]  # crops of 192, of 128
    elif model_type == "internvl":
        assert batch["pixel_values"].shape == (3 + 1 + 4, 3, 56, 56)  # 2 tiles, 1, 3; thumbnails behind several
    elif model_type == "gemma3":
        assert batch["pixel_values"].shape == (3, 3, 56, 56)
        assert batch["token_type_ids"].sum() == 3 * 4
    elif model_type in ("idefics3", "smolvlm"):
        assert batch["pixel_values"].shape == (3, 8, 3, 40, 40)  # tiles and the whole: 5; none; 5 and 3
        padding = (batch["pixel_values"] == 0).all(dim=(2, 3, 4))
        assert padding.sum(1).tolist() == [3, 8, 0]
    else:
        assert batch["image_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 4], [1, 4, 10]]
        assert batch["pixel_values"].shape[0] == 24 + 16 + 40
    text_only = batch_of(run.loaded, run.dataset_dir, "train", [2])
    assert set(text_only) - {"mm_token_type_ids", "token_type_ids"} == {"input_ids", "attention_mask", "labels"}


class ReachedError(Exception):
    pass


def first_of_the_tower(model: Any, family: Any, batch: dict[str, Any]) -> torch.Tensor:
    """What the vision tower's first layer gets; nothing behind it runs."""

    def stop(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        raise ReachedError(args[0])

    convolutions = torch.nn.Conv2d | torch.nn.Conv3d
    layer = next(
        module
        for name, module in model.named_modules()
        if isinstance(module, convolutions) and module.in_channels == 3 and family.part_of(name) == "vision"
    )
    handle = layer.register_forward_pre_hook(stop)
    try:
        with pytest.raises(ReachedError) as reached, torch.no_grad():
            model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        handle.remove()
    return reached.value.args[0]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_bytes_become_the_very_numbers_that_the_tower_would_make_of_float32(
    tiny_run: Callable, model_type: str
) -> None:
    run = tiny_run(model_type)
    processing, family = run.loaded.processing, run.loaded.family
    rows = [PreparedDataset(run.dataset_dir, "train")[number] for number in (0, 2, 1)]  # one image, none, two
    # Data loaders send batches from one process to another.
    sent = pickle.dumps(VisionDataCollator(processing, pixels_as_bytes=True)(rows))
    given = pickle.loads(sent)  # noqa: S301 - made here
    expected = VisionDataCollator(processing)(rows)
    assert [name for name, value in given.items() if isinstance(value, PixelBytes)] == [
        name for name, value in expected.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    assert given["pixel_values"].data.dtype == torch.uint8
    assert all(isinstance(value, PixelBytes) or value is None or not torch.is_floating_point(torch.as_tensor(value))
               for value in given.values())  # fmt: skip
    exact, rounded = finished(given), finished(given, torch.bfloat16)
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(exact[name]), torch.as_tensor(value)), name
    assert rounded["pixel_values"].dtype == torch.bfloat16
    model = copy.deepcopy(run.loaded.model).to(torch.bfloat16)
    assert torch.equal(first_of_the_tower(model, family, rounded), first_of_the_tower(model, family, expected))


def test_a_grey_page_travels_with_one_channel(tiny_run: Callable) -> None:
    processing = tiny_run("qwen2_vl").loaded.processing
    grey = np.random.default_rng(0).integers(0, 256, (56, 84, 1), dtype=np.uint8)
    colour = np.random.default_rng(1).integers(0, 256, (84, 56, 3), dtype=np.uint8)
    seen = np.broadcast_to(grey, (56, 84, 3))
    given = processing.pixel_bytes([seen, colour])["pixel_values"]
    assert given.data.nbytes == grey.nbytes + colour.nbytes
    assert torch.equal(given.values(), processing.pixel_inputs([np.ascontiguousarray(seen), colour])["pixel_values"])
