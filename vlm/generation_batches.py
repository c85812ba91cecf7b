"""Which rows are answered together: like lengths, as many as the device's memory holds.

A step of greedy decoding runs the same kernels for one row as for many, and on a GPU it is starting them that takes the
time. So what counts is the number of steps over all batches, which is the sum of their longest answers: few large batches
have few. Leaving finished rows out of a running batch would make its steps smaller but not fewer.

Bytes of a batch, with H the width of a layer, I that of its feed-forward block and K that of its keys:

    cache       2 K per layer for each position of the padded prompt and of the longest answer
    first pass  8 H + 3 I for each position of the padded prompt, while one layer of the language model computes,
                and for each patch, while one layer of the vision tower does
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlm.families import Family
from vlm.training.memory import Tower, towers

# What the estimate does not know: attention masks, scores of windows, features of several layers, keys of images that text
# looks at. On an H200, batches of pages took as much as the estimate (Qwen) to three times as much (Llama 3.2 Vision).
_SHARE = 1 / 3
# On a CPU the memory of a process may be limited in ways that it cannot see.
_CPU_BYTES = 4 * 2**30


@dataclass(frozen=True)
class RowCosts:
    """Bytes that a row takes."""

    position_bytes: float
    """Of the cache, for each position of the prompt and of the answer."""
    prompt_bytes: float
    """Of the first pass through the language model, for each position of the prompt."""
    visual_bytes: float
    """Of the vision tower, for each visual token."""

    @classmethod
    def of(cls, config: Mapping[str, Any], family: Family, value_bytes: int) -> RowCosts:
        """Reads them from a model's shapes.

        Args:
            config: The model's `config.json`.
            family: Its row of the table.
            value_bytes: Bytes of one value.
        """
        language, vision, merged_patches = towers(config, family)
        patches = family.patches_per_token(config) if family.patches_per_token else merged_patches
        return cls(
            position_bytes=2.0 * language.num_layers * language.key_value * value_bytes,
            prompt_bytes=_pass_values(language) * value_bytes,
            visual_bytes=patches * _pass_values(vision) * value_bytes,
        )

    def batch_bytes(self, length_tokens: int, num_visual_tokens: int, num_rows: int, max_new_tokens: int) -> float:
        """Bytes of a batch at its peak.

        Args:
            length_tokens: Of the longest prompt.
            num_visual_tokens: Of all rows.
            num_rows: In the batch.
            max_new_tokens: Longest answer.
        """
        cache = num_rows * (length_tokens + max_new_tokens) * self.position_bytes
        # The tower has finished before the language model begins.
        first = max(num_rows * length_tokens * self.prompt_bytes, num_visual_tokens * self.visual_bytes)
        return cache + first


def _pass_values(tower: Tower) -> float:
    return 8.0 * tower.hidden + 3.0 * tower.intermediate


def memory_budget(device: torch.device) -> float:
    """Bytes that a batch may take: a share of what the model leaves.

    It goes by the device's size and not by what is free at the moment, so that a rerun makes the same batches.

    Args:
        device: Of the model.
    """
    if device.type != "cuda":
        return _CPU_BYTES
    return _SHARE * (torch.cuda.mem_get_info(device)[1] - torch.cuda.memory_allocated(device))


def batches(
    lengths: Sequence[int],
    visual: Sequence[int],
    costs: RowCosts,
    *,
    most_rows: int,
    max_new_tokens: int,
    budget_bytes: float,
) -> Iterator[list[int]]:
    """Forms batches, longest prompts first, so that what does not fit fails early.

    Answers' lengths are not looked at: nothing about an answer may depend on the right one.

    Args:
        lengths: Tokens of each row's prompt.
        visual: Visual tokens of each row.
        costs: Of the model.
        most_rows: Rows of a batch at most.
        max_new_tokens: Longest answer.
        budget_bytes: What a batch may take; a row that takes more is a batch by itself.

    Yields:
        Places in `lengths`, each in one batch.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    batch: list[int] = []
    num_visual = 0
    for place in order:
        grown = num_visual + visual[place]
        longest = lengths[batch[0]] if batch else lengths[place]
        size = costs.batch_bytes(longest, grown, len(batch) + 1, max_new_tokens)
        if batch and (len(batch) == most_rows or size > budget_bytes):
            yield batch
            batch, grown = [], visual[place]
        batch.append(place)
        num_visual = grown
    if batch:
        yield batch
