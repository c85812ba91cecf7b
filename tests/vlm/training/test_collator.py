from collections.abc import Callable

import pytest

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
    tokenizer = run.loaded.processing.tokenizer
    length = max(len(row.input_ids) for row in rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (4, length)
    for number, row in enumerate(rows):
        ids = row.input_ids.tolist()
        # By words, not by spans: in the last turn, everything behind the header line up to the end-of-turn token counts.
        words = tokenizer.convert_ids_to_tokens(ids)
        turn = len(words) - words[::-1].index("<|im_start|>")
        first = words.index("Ċ", turn) + 1  # behind "assistant" and a line break
        last = len(words) - words[::-1].index("<|im_end|>") - 1
        answer = range(first, last + 1)
        assert tokenizer.decode(ids[first:last]) == row.target
        vision = {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"}
        for position in range(length):
            label = int(batch["labels"][number, position])
            if position >= len(ids):
                assert label == IGNORED
                assert batch["attention_mask"][number, position] == 0
                assert batch["input_ids"][number, position] == run.loaded.processing.pad_token_id
                continue
            assert batch["input_ids"][number, position] == ids[position]
            learnt = words[position] not in vision if train_on_prompts else position in answer
            assert label == (ids[position] if learnt else IGNORED), (number, position, words[position])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_image_tensors_follow_the_rows(tiny_run: Callable, model_type: str) -> None:
    run = tiny_run(model_type)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 2, 1])  # one image, none, two
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 4], [1, 4, 10]]
    assert batch["pixel_values"].shape[0] == 24 + 16 + 40
    text_only = batch_of(run.loaded, run.dataset_dir, "train", [2])
    assert "pixel_values" not in text_only
