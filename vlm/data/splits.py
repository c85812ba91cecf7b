"""Divides rows among splits by a hash, so that it depends on nothing but the row's group, or id, and the seed."""

from __future__ import annotations

import hashlib

from vlm.config.data import SplitConfig

SPLITS = ("train", "validation", "test")


def stable_hash(*parts: str | int) -> int:
    """64 bits that are the same in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def split_of(key: str, config: SplitConfig) -> str:
    """Split of all rows with this key (their group, or the id of a row without one)."""
    position = stable_hash(config.seed, key) / 2**64
    if position < config.test_fraction:
        return "test"
    return "validation" if position < config.test_fraction + config.validation_fraction else "train"


class LeakWatch:
    """Notices groups that sources put into more than one split; keeps 64 bits per group, not its name."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    def other_splits(self, group: str, split: str) -> list[str]:
        """Splits that this group was in before, if this row is its first in ``split``; else nothing."""
        key, bit = stable_hash(group), 1 << SPLITS.index(split)
        before = self._seen.get(key, 0)
        if before & bit:
            return []
        self._seen[key] = before | bit
        return [name for index, name in enumerate(SPLITS) if before & (1 << index)]


class UniqueNames:
    """Makes ids unique, because predictions are matched by them; keeps 64 bits per id."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def claim(self, name: str, suffix: str) -> str:
        """``name``, or ``name`` with a suffix if it is taken."""
        while (key := stable_hash(name)) in self._seen:
            name = f"{name}#{suffix}"
        self._seen.add(key)
        return name
