import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.packing.bins import balanced, best_subset, filled, first_fit_decreasing


def as_sizes(*columns: list[int]) -> np.ndarray:
    return np.array(columns, np.float64).T


def test_first_fit_decreasing_by_hand() -> None:
    sizes = as_sizes([4, 8, 1, 4, 2, 1])
    assert first_fit_decreasing(sizes, np.array([10.0])) == [[1, 4], [0, 3, 2, 5]]


def test_every_measure_counts() -> None:
    # By tokens all would fit into one; by visual tokens no two of the first three do.
    sizes = as_sizes([1, 1, 1, 5], [6, 6, 6, 0])
    bins = first_fit_decreasing(sizes, np.array([10.0, 10.0]))
    assert sorted(map(sorted, bins)) == [[0, 3], [1], [2]]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=40),
    st.integers(60, 300),
    st.integers(60, 300),
)
def test_packs_hold_every_item_once_and_keep_the_limits(items: list, tokens: int, visual: int) -> None:
    sizes, limits = np.array(items, np.float64), np.array([tokens, visual], np.float64)
    bins = first_fit_decreasing(sizes, limits)
    spread = balanced(sizes, limits, bins)
    totals = sizes.sum(0)
    assert len(spread) == len(bins) >= (totals / limits).max()
    for candidate in (bins, spread):
        assert sorted(item for items in candidate for item in items) == list(range(len(sizes)))
        assert all((sizes[items].sum(0) <= limits).all() for items in candidate)

    def fullest(candidate: list[list[int]]) -> float:
        return max((sizes[items].sum(0) / np.maximum(totals, 1)).max() for items in candidate)

    assert fullest(spread) <= fullest(bins)


def test_balance_by_visual_tokens_too() -> None:
    # First fit fills the first bin with all the images.
    tokens, visual = [50, 50, 50, 50], [40, 40, 0, 0]
    sizes, limits = as_sizes(tokens, visual), np.array([100.0, 100.0])
    spread = balanced(sizes, limits, [[0, 1], [2, 3]])
    assert sorted(sizes[items].sum(0).tolist() for items in spread) == [[100, 40], [100, 40]]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 30), max_size=10), st.integers(0, 120))
def test_best_subset_against_all_subsets(sizes: list[int], space: int) -> None:
    sums = {0}
    for size in sizes:
        sums |= {total + size for total in sums}
    chosen = best_subset(sizes, space)
    assert chosen == sorted(set(chosen))
    assert sum(sizes[place] for place in chosen) == max(total for total in sums if total <= space)


@pytest.mark.parametrize(("low", "high", "capacity"), [(30, 200, 4096), (600, 1600, 8192), (60, 400, 2048)])
def test_packs_from_a_stream_are_full_and_wait_for_none(low: int, high: int, capacity: int) -> None:
    lengths = np.random.default_rng(0).integers(low, high, 2000)
    packs = list(filled(lengths, range(2000), capacity))
    rows = [row for pack in packs for row in pack]
    assert sorted(rows) == list(range(2000))
    totals = np.array([lengths[pack].sum() for pack in packs])
    assert (totals <= capacity).all()
    assert totals[:-3].sum() / (capacity * (len(totals) - 3)) > 0.99
    # No row is more than a few packs later than in order.
    per_pack = capacity / lengths.mean()
    late = [number - row / per_pack for number, pack in enumerate(packs) for row in pack]
    assert max(late) < 128 / per_pack + 3


def test_the_end_of_a_stream() -> None:
    lengths = np.array([5, 4, 3])
    assert list(filled(lengths, [0, 1, 2, 0], 6)) == [[0], [1], [2], [0]]
    assert list(filled(lengths, [], 6)) == []
