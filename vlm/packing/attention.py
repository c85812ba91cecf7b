"""Attention within segments of one packed row, as an attention function of transformers.

    keys      a a a b b c c c c
    queries a x . . . . . . . .
            a x x . . . . . . .       one triangle (causal) or square per segment;
            a x x x . . . . . .       the dots are never computed, so nothing of one
            b . . . x . . . . .       sample, not even a NaN, reaches another
            b . . . x x . . . .
            c . . . . . x . . .  ...

Two ways, chosen by the queries: PyTorch's ``varlen_attn`` on a GPU in 16 bit, where the whole row is one kernel; else
scaled dot product attention per segment, neighbouring segments of equal length as one batch. The cost of either is the
sum of squared lengths.

Where segments end is said by who made the row, never guessed from positions. Calls that say nothing go to transformers'
own function, so that padded batches work as ever.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vlm.errors import ConfigError

# Vision towers at native resolution hand over their boundaries only to attention whose name has "flash" in it.
TOWER_ATTENTION = "packed_flash"
LANGUAGE_ATTENTION = "packed"
# Head sizes that the kernel takes.
_HEAD_MULTIPLE, _LARGEST_HEAD = 8, 256


@dataclass(frozen=True)
class Segments:
    """Which queries attend to which keys: segment i of the queries to segment i of the keys.

    Attributes:
        ends_q: int32 tensor of shape [segments + 1] on the device of the model: 0 and the end of each query segment.
        lengths_q: The lengths of the query segments.
        ends_k: As `ends_q` for keys; None where they are those of the queries.
        lengths_k: As `lengths_q` for keys; None where they are those of the queries.
        causal: Whether a query sees only keys up to itself; None leaves that to the layer.
        queries: Positions that the query segments are made of, shape [queries]; None for all in order. The output is zero
            at all others.
        kernel_only: Whether the lengths are but the greatest one over and over, since ends change between replays of a
            CUDA graph; only the kernel for segments can do with that.
        keys: Positions that the key segments are made of, shape [keys], repetitions allowed; None for all in order.
    """

    ends_q: torch.Tensor
    lengths_q: Sequence[int]
    ends_k: torch.Tensor | None = None
    lengths_k: Sequence[int] | None = None
    causal: bool | None = None
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    kernel_only: bool = False

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device) -> Segments:
        """Segments that follow each other without a gap.

        Args:
            lengths: Of each segment.
            device: Of the model.
        """
        return cls(ends_of(lengths, device), lengths)


def ends_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """0 and the end of each segment, an int32 tensor of shape [segments + 1]."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def register() -> None:
    """Makes the function known to transformers; again does no harm."""
    for name in (LANGUAGE_ATTENTION, TOWER_ATTENTION):
        AttentionInterface.register(name, packed_attention)
        # For padded batches; a packed row comes with a mask of four dimensions, upon which none is built.
        AttentionMaskInterface.register(name, sdpa_mask)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    segments: Segments | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention, in the form in which transformers calls such a function.

    Args:
        module: The attention layer; its `is_causal` counts where the argument is None.
        query: Tensor of shape [batch, heads, queries, head].
        key: Tensor of shape [batch, key heads, keys, head].
        value: As `key`.
        attention_mask: Not looked at where there are segments.
        dropout: Only 0 with segments.
        scaling: Of the scores; None for ``1 / sqrt(head)``.
        is_causal: Whether a position sees only those up to itself.
        segments: Of the language model's row; needs a batch of 1.
        cu_seq_lens_q: Ends of the segments where a vision tower found them itself.
        max_length_q: Their greatest length.
        sliding_window: Positions that one sees, itself included; None for all of its segment.
        **kwargs: What else transformers passes.

    Returns:
        Tensor of shape [batch, queries, heads, head], and None for the weights.

    Raises:
        ConfigError: The model asks for something that has no meaning here.
    """
    if segments is None and cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    _check(query, dropout, kwargs)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if segments is None:
        assert cu_seq_lens_q is not None
        # Lengths are asked of the device only where the kernel does not take the tensor.
        if takes_varlen(query) and max_length_q is not None:
            ends = cu_seq_lens_q.to(torch.int32)
            return _varlen(query, key, value, ends, ends, max_length_q, max_length_q, scaling, causal, None), None
        segments = Segments(cu_seq_lens_q, cu_seq_lens_q.diff().tolist())
    if segments.causal is not None:
        causal = segments.causal
    return attend(query, key, value, segments, scaling=scaling, causal=causal, window=sliding_window), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    scaling: float | None = None,
    causal: bool = False,
    window: int | None = None,
) -> torch.Tensor:
    """Attention within segments.

    Args:
        query: Tensor of shape [1, heads, queries, head].
        key: Tensor of shape [1, key heads, keys, head].
        value: As `key`.
        segments: Which queries attend to which keys.
        scaling: Of the scores; None for ``1 / sqrt(head)``.
        causal: Whether a position sees only those up to itself.
        window: With `causal`, how many positions one sees, itself included; None for all up to itself.

    Returns:
        Tensor of shape [1, queries, heads, head].
    """
    window = window if causal else None
    num_queries = query.shape[2]
    lengths_q = segments.lengths_q
    lengths_k = lengths_q if segments.lengths_k is None else segments.lengths_k
    if segments.queries is not None:
        query = query.index_select(2, segments.queries)
    if segments.keys is not None:
        key, value = (tensor.index_select(2, segments.keys) for tensor in (key, value))
    assert sum(lengths_q) == query.shape[2], "segments cover all queries"
    assert sum(lengths_k) == key.shape[2], "segments cover all keys"
    if takes_varlen(query):
        ends_k = segments.ends_q if segments.ends_k is None else segments.ends_k
        longest = max(lengths_q, default=0), max(lengths_k, default=0)
        output = _varlen(query, key, value, segments.ends_q, ends_k, *longest, scaling, causal, window)
    elif segments.kernel_only:
        raise RuntimeError(f"the kernel for segments does not take {_dtype(query)} with heads of {query.shape[-1]}")
    else:
        output = _by_segment(query, key, value, lengths_q, lengths_k, scaling, causal, window)
    if segments.queries is None:
        return output
    whole = output.new_zeros(1, num_queries, *output.shape[2:])
    return whole.index_copy(1, segments.queries, output)


def takes_varlen(query: torch.Tensor) -> bool:
    """Whether the kernel for segments takes these queries: on a GPU, in 16 bit, with heads of a size that it knows.

    Args:
        query: Tensor of shape [batch, heads, queries, head].
    """
    head = query.shape[-1]
    return (
        query.is_cuda
        and _dtype(query) in (torch.bfloat16, torch.float16)
        and head % _HEAD_MULTIPLE == 0
        and head <= _LARGEST_HEAD
    )


def _dtype(query: torch.Tensor) -> torch.dtype:
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


@functools.cache
def _kernel() -> tuple[Any, frozenset[str]]:
    """The kernel's function and the names of its arguments, which differ between versions of PyTorch."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    kernel, names = _kernel()
    dtype, head = _dtype(query), query.shape[-1]
    # [1, heads, tokens, head] to [tokens, heads, head]. The gradient of `tensor[0]` would be copied into zeros.
    query, key, value = (tensor.squeeze(0).transpose(0, 1).to(dtype) for tensor in (query, key, value))
    options: dict[str, Any] = {}
    if scaling is not None and "scale" in names:
        options["scale"] = scaling
    elif scaling is not None and scaling != head**-0.5:
        query = query * (scaling * head**0.5)
    if "window_size" in names:
        options["window_size"] = (-1 if window is None else window - 1, 0) if causal else (-1, -1)
    else:
        assert window is None, "this version of PyTorch has no kernel for windows"
        options["is_causal"] = causal
    if key.shape[1] != query.shape[1] and "enable_gqa" in names:
        options["enable_gqa"] = True
    output = kernel(query, key, value, ends_q, ends_k, longest_q, longest_k, **options)
    assert isinstance(output, torch.Tensor)
    return output[None]


def _by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    scaling: float | None,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """Segment by segment; neighbours of equal lengths as one batch. Shape [1, queries, heads, head]."""
    if query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    runs = list(_runs(lengths_q, lengths_k))
    # Split and not sliced: the gradient of a slice is as long as the row, so that many slices would cost a square.
    parts_q = query[0].split([count * length_q for count, length_q, _ in runs], 1)
    parts_k, parts_v = (
        tensor[0].split([count * length_k for count, _, length_k in runs], 1) for tensor in (key, value)
    )
    outputs = []
    for (count, length_q, length_k), part_q, part_k, part_v in zip(runs, parts_q, parts_k, parts_v, strict=True):
        # [heads, count * length, head] to [count, heads, length, head]
        q = part_q.unflatten(1, (count, length_q)).transpose(0, 1)
        k = part_k.unflatten(1, (count, length_k)).transpose(0, 1)
        v = part_v.unflatten(1, (count, length_k)).transpose(0, 1)
        band = None
        if window is not None and window < length_q:
            index = torch.arange(length_q, device=query.device)
            distance = index[:, None] - index
            band = (distance >= 0) & (distance < window)
        output = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=causal and band is None, scale=scaling
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    if not outputs:
        return query.new_zeros(1, 0, query.shape[1], value.shape[-1])
    return torch.cat(outputs)[None]


def _runs(lengths_q: Sequence[int], lengths_k: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of neighbouring segments of equal lengths: how many, and both lengths."""
    for (length_q, length_k), run in itertools.groupby(zip(lengths_q, lengths_k, strict=True)):
        yield len(list(run)), length_q, length_k


def _check(query: torch.Tensor, dropout: float, kwargs: dict[str, Any]) -> None:
    assert query.shape[0] == 1, "a packed row is a batch of one"
    if dropout:
        raise ConfigError(
            f"the model's configuration has an attention dropout of {dropout}, which packed attention does not have; set it"
            " to 0 there, as in the published models, or set training.packing to false"
        )
    for name in ("softcap", "position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"the model's attention asks for {name}={kwargs[name]!r}, which packed attention does not have;"
                " set training.packing to false"
            )
