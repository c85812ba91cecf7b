from collections import Counter

import numpy as np
import pytest

from vlm.config import TrainingConfig
from vlm.errors import ConfigError
from vlm.training.steps import PackLimits, full_pack_size, plan_batches, plan_full_packs, plan_packs

LENGTHS = np.array([5, 40, 12, 33, 7, 21, 9, 30, 16, 11])


def rows_of(training: TrainingConfig, lengths: np.ndarray = LENGTHS) -> list[tuple[int, list[int]]]:
    return [(step, rows.tolist()) for step, rows in plan_batches(lengths, training)]


def test_an_epoch_sees_every_row_once() -> None:
    batches = rows_of(TrainingConfig(batch_size=2, gradient_accumulation=2))
    assert sorted(row for _, rows in batches for row in rows) == list(range(10))
    assert [len(rows) for _, rows in batches] == [2, 2, 2, 2, 2]
    assert [step for step, _ in batches] == [0, 0, 1, 1, 2]  # the last step is short


def test_epochs_follow_each_other_without_a_gap() -> None:
    batches = rows_of(TrainingConfig(epochs=2.5, batch_size=3, gradient_accumulation=1))
    stream = [row for _, rows in batches for row in rows]
    assert len(stream) == 25
    assert set(Counter(stream).values()) == {2, 3}
    assert [len(rows) for _, rows in batches] == [3] * 8 + [1]


def test_max_steps_fill_every_step() -> None:
    batches = rows_of(TrainingConfig(max_steps=7, batch_size=2, gradient_accumulation=3))
    assert Counter(step for step, _ in batches) == dict.fromkeys(range(7), 3)
    assert all(len(rows) == 2 for _, rows in batches)


def test_rows_of_a_step_do_not_depend_on_its_cut_into_micro_batches() -> None:
    cuts = [(1, 8), (2, 4), (8, 1)]
    steps = []
    for batch_size, accumulation in cuts:
        rows: dict[int, list[int]] = {}
        for step, batch in rows_of(TrainingConfig(epochs=3, batch_size=batch_size, gradient_accumulation=accumulation)):
            rows.setdefault(step, []).extend(batch)
        steps.append({step: sorted(batch) for step, batch in rows.items()})
    assert steps[0] == steps[1] == steps[2]


def test_within_a_step_rows_go_by_length() -> None:
    for _, rows in rows_of(TrainingConfig(epochs=4, batch_size=10, gradient_accumulation=1)):
        assert LENGTHS[rows].tolist() == sorted(LENGTHS[rows].tolist(), reverse=True)


def test_the_seed_decides_the_order() -> None:
    assert rows_of(TrainingConfig(seed=1)) == rows_of(TrainingConfig(seed=1))
    assert rows_of(TrainingConfig(seed=1)) != rows_of(TrainingConfig(seed=2))


VISUAL = np.array([0, 30, 4, 20, 0, 12, 4, 24, 8, 4])
Packs = list[tuple[int, list[int]]]


def packs_of(training: TrainingConfig, tokens: int | None = None, budget: float = np.inf) -> Packs:
    limits = PackLimits(tokens, (LENGTHS + 2 * VISUAL).astype(np.float64)[:, None], budget)
    return [(step, rows.tolist()) for step, rows in plan_packs(LENGTHS, VISUAL, training, limits)]


def steps_of(packs: Packs) -> dict[int, list[int]]:
    steps: dict[int, list[int]] = {}
    for step, rows in packs:
        steps.setdefault(step, []).extend(rows)
    return {step: sorted(rows) for step, rows in steps.items()}


def test_steps_of_packs_are_those_of_padded_batches() -> None:
    training = TrainingConfig(epochs=3, batch_size=2, gradient_accumulation=2)
    padded = steps_of(rows_of(training))
    assert padded == steps_of(packs_of(training)) == steps_of(packs_of(training, tokens=45))
    # Without a limit a step is one pack.
    assert len(packs_of(training)) == len(padded)


def test_packs_keep_both_limits() -> None:
    training = TrainingConfig(epochs=5, batch_size=5, gradient_accumulation=1)
    cost = LENGTHS + 2 * VISUAL
    assert all(LENGTHS[rows].sum() <= 60 for _, rows in packs_of(training, tokens=60))
    by_memory = packs_of(training, budget=110)
    assert all(cost[rows].sum() <= 110 for _, rows in by_memory)
    assert len(by_memory) > len(packs_of(training))
    # What is over the budget by itself goes alone; whether it fits at all is for the memory check to say.
    assert all(len(rows) == 1 for _, rows in packs_of(training, budget=10) if cost[rows].max() > 10)


def test_full_packs_see_every_row_once_per_epoch() -> None:
    lengths = np.random.default_rng(0).integers(50, 400, 1000)
    training = TrainingConfig(epochs=2, tokens_per_step=8192, max_tokens_per_pack=4096)
    limits = PackLimits(4096, lengths[:, None].astype(np.float64), np.inf)
    capacity, packs_per_step = full_pack_size(lengths, training, limits)
    assert packs_per_step == 2
    packs = list(plan_full_packs(lengths, training, capacity, packs_per_step))
    assert set(Counter(row for _, rows in packs for row in rows).values()) == {2}
    assert set(Counter(step for step, _ in packs[:-1]).values()) <= {1, 2}
    totals = np.array([lengths[rows].sum() for _, rows in packs])
    assert (totals <= capacity).all()
    # The last one included.
    assert totals.sum() / (len(totals) * capacity) > 0.97


def test_full_packs_for_a_number_of_steps() -> None:
    lengths = np.random.default_rng(0).integers(50, 400, 300)
    training = TrainingConfig(max_steps=20, tokens_per_step=4096)
    capacity, packs_per_step = full_pack_size(lengths, training, PackLimits(None, lengths[:, None] * 1.0, np.inf))
    assert (capacity, packs_per_step) == (4096, 1)
    packs = list(plan_full_packs(lengths, training, capacity, packs_per_step))
    assert [step for step, _ in packs] == list(range(20))
    assert all(lengths[rows].sum() > 0.97 * 4096 for _, rows in packs)


def test_the_size_of_full_packs_follows_memory() -> None:
    lengths = np.array([100, 200, 300])
    training = TrainingConfig(max_steps=1, tokens_per_step=4000)
    cost = np.array([100.0, 400.0, 300.0])  # two bytes per token at most
    assert full_pack_size(lengths, training, PackLimits(None, cost[:, None], 2500.0)) == (1000, 4)
    # A pack holds the longest row in any case.
    assert full_pack_size(lengths, training, PackLimits(None, cost[:, None], 100.0)) == (307, 13)
    with pytest.raises(ConfigError, match="tokens_per_step 250 is less than the longest conversation's 300 tokens"):
        full_pack_size(lengths, TrainingConfig(tokens_per_step=250), PackLimits(None, cost[:, None], np.inf))
