from itertools import chain

import numpy as np
import pytest

from vlm.training.distributed.dealing import dealt_batches, dealt_packs, shares


def step(seed: int, num_packs: int) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(20, 400, 60)
    visual = np.where(generator.random(60) < 0.3, 0, lengths // 2)
    rows = generator.permutation(60)[: 7 * num_packs]
    return [sorted(part.tolist()) for part in np.array_split(rows, num_packs)], lengths, visual


@pytest.mark.parametrize("num_processes", [2, 3, 8])
@pytest.mark.parametrize("num_packs", [1, 3, 5])
@pytest.mark.parametrize("deal", [dealt_packs, dealt_batches])
def test_every_row_is_dealt_once_and_equally_many_parts_to_all(
    deal: object, num_packs: int, num_processes: int
) -> None:
    packs, lengths, visual = step(num_packs, num_packs)
    dealt = deal(packs, lengths, visual, num_processes)  # type: ignore[operator]
    assert sorted(row for parts in dealt for part in parts for row in part) == sorted(chain(*packs))
    counts = [len(parts) for parts in dealt]
    assert max(counts) - min(counts) <= 1
    assert max(counts) == -(-num_packs // num_processes)
    assert dealt == deal(packs, lengths, visual, num_processes)  # type: ignore[operator]


@pytest.mark.parametrize("num_processes", [2, 4])
def test_packs_are_as_costly_for_every_process_and_no_larger_than_planned(num_processes: int) -> None:
    packs, lengths, visual = step(0, 4)
    dealt = dealt_packs(packs, lengths, visual, num_processes)
    for sizes in (lengths, visual):
        loads = [sum(int(sizes[part].sum()) for part in parts) for parts in dealt]
        # The largest row is what one process may be ahead of another.
        assert max(loads) - min(loads) <= sizes.max()
        assert max(sizes[part].sum() for parts in dealt for part in parts) <= max(sizes[pack].sum() for pack in packs)


def test_a_step_of_fewer_rows_than_processes_leaves_some_without() -> None:
    lengths, visual = np.array([5, 6, 7]), np.array([0, 0, 0])
    for deal in (dealt_packs, dealt_batches):
        dealt = deal([[2, 0]], lengths, visual, 4)
        assert sorted(map(len, dealt)) == [0, 0, 1, 1]


def test_padded_batches_keep_rows_of_like_length_together() -> None:
    lengths = np.array([10, 100, 11, 101, 12, 102])
    dealt = dealt_batches([[1, 3, 5, 0, 2, 4]], lengths, np.zeros(6, np.int64), 2)
    assert sorted(sorted(parts[0]) for parts in dealt) == [[0, 2, 4], [1, 3, 5]]


def test_shares_are_even_and_leave_nothing_out() -> None:
    lengths = np.array([50, 40, 30, 20, 10])
    taken = shares([[0], [1], [2], [3, 4]], lengths, 2)
    assert sorted(chain(*taken)) == [0, 1, 2, 3]
    assert [sum(lengths[[[0], [1], [2], [3, 4]][place]].sum() for place in places) for places in taken] == [80, 70]
    assert shares([[0]], lengths, 3) == [[0], [], []]
