from collections.abc import Callable

import pytest

from tests.support.tiny_models import TINY
from tests.support.tiny_runs import batch_of
from vlm.data.prepared import PreparedDataset
from vlm.families import FAMILIES
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
    elif model_type in ("idefics3", "smolvlm"):
        assert batch["pixel_values"].shape == (3, 8, 3, 40, 40)  # tiles and the whole: 5; none; 5 and 3
        padding = (batch["pixel_values"] == 0).all(dim=(2, 3, 4))
        assert padding.sum(1).tolist() == [3, 8, 0]
    else:
        assert batch["image_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 4], [1, 4, 10]]
        assert batch["pixel_values"].shape[0] == 24 + 16 + 40
    text_only = batch_of(run.loaded, run.dataset_dir, "train", [2])
    assert set(text_only) - {"mm_token_type_ids"} == {"input_ids", "attention_mask", "labels"}
