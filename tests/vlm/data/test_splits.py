"""A group is never torn, whatever the rows are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vlm.config.data import SplitConfig
from vlm.data.splits import LeakWatch, UniqueNames, split_of


@given(key=st.text(), seed=st.integers(0, 2**32), test=st.floats(0, 0.49), validation=st.floats(0, 0.49))
def test_the_split_depends_on_key_and_seed_alone(key, seed, test, validation):
    config = SplitConfig(seed=seed, test_fraction=test, validation_fraction=validation)
    assert split_of(key, config) == split_of(key, config.model_copy())
    if test == 0:
        assert split_of(key, config) != "test"


def test_fractions_are_kept_and_seeds_differ():
    keys = [f"group {number}" for number in range(4000)]
    splits = [split_of(key, SplitConfig(test_fraction=0.2, validation_fraction=0.1)) for key in keys]
    # Three standard deviations of a binomial draw.
    assert abs(splits.count("test") - 800) < 3 * (4000 * 0.2 * 0.8) ** 0.5
    assert abs(splits.count("validation") - 400) < 3 * (4000 * 0.1 * 0.9) ** 0.5
    assert splits != [split_of(key, SplitConfig(seed=1, test_fraction=0.2, validation_fraction=0.1)) for key in keys]


def test_more_test_rows_only_move_rows_into_test():
    keys = [str(number) for number in range(500)]
    small = {key for key in keys if split_of(key, SplitConfig(test_fraction=0.1)) == "test"}
    assert small < {key for key in keys if split_of(key, SplitConfig(test_fraction=0.3)) == "test"}


def test_a_leak_is_told_once_per_split():
    watch = LeakWatch()
    told = [watch.other_splits("a", split) for split in ("train", "train", "test", "test", "train", "validation")]
    assert told == [[], [], ["train"], [], [], ["train", "test"]]
    assert watch.other_splits("b", "test") == []


@given(st.lists(st.sampled_from(["a", "b", "a#1", "b#2"]), max_size=30))
def test_names_become_unique(names):
    unique = UniqueNames()
    claimed = [unique.claim(name, str(number)) for number, name in enumerate(names)]
    assert len(set(claimed)) == len(names)
    assert all(new.startswith(old) for old, new in zip(names, claimed, strict=True))
