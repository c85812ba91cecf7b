"""What PyTorch's kernel for segments computes, segment by segment, for tests of what is handed to it on a GPU."""

from __future__ import annotations

from typing import Any

import torch


def slow_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention over [tokens, heads, head] with the arguments of ``varlen_attn`` of PyTorch 2.13."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    lengths_q, lengths_k = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max(lengths_q), max(lengths_k)) == (max_q, max_k)
    assert enable_gqa == (key.shape[1] != query.shape[1])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    parts = (query.split(lengths_q), key.split(lengths_k), value.split(lengths_k))
    for q, k, v in zip(*parts, strict=True):
        k, v = (own.repeat_interleave(q.shape[1] // k.shape[1], 1) for own in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        # The last query is level with the last key.
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        left, right = window_size
        seen = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            seen &= distance <= left
        if right >= 0:
            seen &= -distance <= right
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def slow_varlen_2_10(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> torch.Tensor:
    """The same with fewer arguments, as in the kernel's first version; grouped key heads are taken as they come."""
    window = (-1, 0) if is_causal else (-1, -1)
    grouped = key.shape[1] != query.shape[1]
    ends: Any = (cu_seq_q, cu_seq_k)
    return slow_varlen(query, key, value, *ends, max_q, max_k, window_size=window, enable_gqa=grouped)
