from collections.abc import Callable

import pytest
import torch

from vlm.generation_batches import RowCosts, batches, memory_budget

COSTS = RowCosts(position_bytes=1.0, prompt_bytes=2.0, visual_bytes=10.0)


def test_longest_prompts_first_and_no_more_rows_than_asked() -> None:
    formed = list(batches([5, 9, 7, 9], [0] * 4, COSTS, most_rows=3, max_new_tokens=4, budget_bytes=1e9))
    assert formed == [[1, 3, 2], [0]]
    assert not list(batches([], [], COSTS, most_rows=3, max_new_tokens=4, budget_bytes=1e9))


def test_batches_keep_to_the_budget_and_a_larger_row_is_alone() -> None:
    lengths, visual = [100, 40, 30, 30, 6, 5, 4], [0, 0, 28, 0, 4, 4, 0]
    formed = list(batches(lengths, visual, COSTS, most_rows=64, max_new_tokens=10, budget_bytes=300))
    assert sorted(place for batch in formed for place in batch) == list(range(7))
    assert formed[0] == [0]
    for batch in formed:
        size = COSTS.batch_bytes(lengths[batch[0]], sum(visual[place] for place in batch), len(batch), 10)
        assert size <= 300 or len(batch) == 1
    # Two prompts of 30: a cache of 2 x 40, a first pass of 2 x 60 or of 28 x 10 for images, which is too much for both.
    assert COSTS.batch_bytes(30, 0, 2, 10) == 200
    assert COSTS.batch_bytes(30, 28, 2, 10) == 360
    assert [2] in formed


@pytest.mark.parametrize("model_type", ["qwen2_vl", "deepseek_ocr"])
def test_the_cache_costs_what_it_takes(tiny_run: Callable, model_type: str) -> None:
    run = tiny_run(model_type)
    model = run.loaded.model
    ids = torch.full((3, 11), run.loaded.processing.tokenizer("a").input_ids[-1])
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    costs = RowCosts.of(model.config.to_dict(), run.loaded.family, value_bytes=4)
    assert costs.batch_bytes(0, 0, 3, 11) == held
    assert memory_budget(model.device) > 2 * costs.batch_bytes(11, 0, 3, 11)
