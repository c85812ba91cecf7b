"""The attention function against dense attention under a mask."""

import inspect
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.support.packing_rows import packing_collator, packing_rows
from tests.support.slow_kernel import slow_varlen, slow_varlen_2_10
from vlm.errors import ConfigError
from vlm.families import FAMILIES
from vlm.packing import attention
from vlm.packing.attention import Segments, attend, ends_of, packed_attention
from vlm.packing.model import packed

HEADS, KEY_HEADS, HEAD = 4, 2, 8


def tensors(queries: int, keys: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, queries), (KEY_HEADS, keys), (KEY_HEADS, keys))
    return [torch.randn(1, *shape, HEAD, generator=generator, requires_grad=True) for shape in shapes]


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Softmax over what is seen, in float64. `seen` has the shape [queries, keys]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.double().repeat_interleave(repeats, 1) for tensor in (key, value))
    scores = query.double() @ key.transpose(2, 3) / HEAD**0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    return (weights @ value).transpose(1, 2)


def numbers_of(lengths: Sequence[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def assert_same(found: torch.Tensor, expected: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
    # Float32 sums of up to a few dozen terms.
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)
    weight = torch.linspace(-1, 1, found.numel()).view_as(found)
    grads = torch.autograd.grad((found * weight).sum(), inputs)
    references = torch.autograd.grad((expected * weight.double()).sum(), inputs)
    for grad, reference in zip(grads, references, strict=True):
        torch.testing.assert_close(grad, reference, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(5,), (3, 3, 3, 7, 1, 1), (1, 9, 2, 2)])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 3), (True, 1)])
def test_self_attention_within_segments(lengths: tuple[int, ...], causal: bool, window: int | None) -> None:
    total = sum(lengths)
    inputs = tensors(total, total)
    found = attend(*inputs, Segments(ends_of(lengths), lengths), causal=causal, window=window)
    number, place = numbers_of(lengths), torch.arange(total)
    seen = number[:, None] == number
    if causal:
        seen &= place[:, None] >= place
    if window is not None:
        seen &= place[:, None] - place < window
    assert_same(found, dense(*inputs, seen), inputs)


def test_cross_attention_over_chosen_queries_and_repeated_keys() -> None:
    inputs = tensors(9, 8)
    lengths_q, lengths_k = [2, 3, 1], [3, 6, 2]
    queries, keys = torch.tensor([0, 1, 4, 5, 6, 8]), torch.tensor([0, 1, 2, 2, 3, 4, 5, 6, 7, 0, 7])
    segments = Segments(
        ends_of(lengths_q), lengths_q, ends_of(lengths_k), lengths_k, causal=False, queries=queries, keys=keys
    )
    found = attend(*inputs, segments)
    seen = torch.zeros(9, 8, dtype=torch.bool)
    starts_q, starts_k = ([0, *itertools.accumulate(lengths)] for lengths in (lengths_q, lengths_k))
    for segment in range(3):
        for query in queries[starts_q[segment] : starts_q[segment + 1]]:
            seen[query, keys[starts_k[segment] : starts_k[segment + 1]]] = True
    assert_same(found, dense(*inputs, seen), inputs)
    assert found[0, [2, 3, 7]].abs().max() == 0


def test_nothing_of_a_neighbour_gets_through() -> None:
    lengths = (4, 6, 3)
    query, key, value = (tensor.detach() for tensor in tensors(13, 13))
    segments = Segments(ends_of(lengths), lengths)
    clean = attend(query, key, value, segments, causal=True)
    for poison in (torch.nan, torch.inf, 1e30):
        for tensor in (query, key, value):
            tensor[:, :, 4:10] = poison
        spoilt = attend(query, key, value, segments, causal=True)
        assert torch.equal(spoilt[:, :4], clean[:, :4])
        assert torch.equal(spoilt[:, 10:], clean[:, 10:])


def use_kernel(kernel: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends attention the way that it takes on a GPU in 16 bit."""
    monkeypatch.setattr(attention, "_kernel", lambda: (kernel, frozenset(inspect.signature(kernel).parameters)))
    monkeypatch.setattr(attention, "takes_varlen", lambda query: True)


@pytest.mark.parametrize("kernel", [slow_varlen, slow_varlen_2_10])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 3)])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_what_the_kernel_is_given(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable, causal: bool, window: int | None, scaling: float | None
) -> None:
    if kernel is slow_varlen_2_10 and window is not None:
        pytest.skip("that version has no windows")
    lengths = (3, 3, 7, 1)
    inputs = tensors(14, 14)
    segments = Segments(ends_of(lengths), lengths)
    expected = attend(*inputs, segments, scaling=scaling, causal=causal, window=window)
    use_kernel(kernel, monkeypatch)
    found = attend(*inputs, segments, scaling=scaling, causal=causal, window=window)
    assert_same(found, expected.double(), inputs)


def test_gradients_reach_the_kernels_inputs_as_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking the batch of one off by its index would fill a tensor with zeros for every gradient."""

    def sums(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return query + key.sum() + value.sum()

    names = frozenset(inspect.signature(slow_varlen).parameters)
    monkeypatch.setattr(attention, "_kernel", lambda: (sums, names))
    monkeypatch.setattr(attention, "takes_varlen", lambda query: True)
    nodes, found = [attend(*tensors(5, 5), Segments(ends_of((5,)), (5,))).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None:
            found.add(type(node).__name__)
            nodes += [parent for parent, _ in node.next_functions]
    assert found == {
        "AccumulateGrad",
        "AddBackward0",
        "SumBackward0",
        "SqueezeBackward1",
        "TransposeBackward0",
        "UnsqueezeBackward0",
    }


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.packing is not None])
def test_whole_models_through_the_kernel(tiny_run: Callable, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_run(model_type).loaded
    collator = packing_collator(loaded)
    batch = collator.pack(packing_rows(loaded.processing))
    del batch["labels"]
    calls: list[int] = []

    def counted(*args: Any, scale: float | None = None, **options: Any) -> torch.Tensor:
        calls.append(len(args[0]))
        return slow_varlen(*args, scale=scale, **options)

    with packed(loaded.model, loaded.family), torch.no_grad():
        expected = loaded.model(**batch).logits
        use_kernel(counted, monkeypatch)
        names = frozenset(inspect.signature(slow_varlen).parameters)
        monkeypatch.setattr(attention, "_kernel", lambda: (counted, names))
        found = loaded.model(**batch).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    names_of_layers = [name for name, _ in loaded.model.named_modules()]
    pattern = loaded.family.language_layer + (
        f"|{loaded.family.vision_layer}" if loaded.family.packing.tower_segments else ""
    )
    # One call per layer, whatever the number of samples, images and windows.
    assert len(calls) == sum(re.fullmatch(pattern, name) is not None for name in names_of_layers)


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = HEADS // KEY_HEADS


def test_without_segments_it_is_the_usual_attention() -> None:
    query, key, value = tensors(6, 6)
    place = torch.arange(6)
    seen = place[:, None] >= place
    found, _ = packed_attention(Layer(), query, key, value, None)
    assert_same(found, dense(query, key, value, seen), (query, key, value))
    seen = seen & (place < 4)
    found, _ = packed_attention(Layer(), query, key, value, seen[None, None])
    assert_same(found, dense(query, key, value, seen), (query, key, value))


def test_ends_found_by_a_vision_tower() -> None:
    query, key, value = tensors(7, 7)
    number = numbers_of((4, 3))
    found, _ = packed_attention(
        Layer(), query, key, value, None, is_causal=False, cu_seq_lens_q=ends_of((4, 3)), max_length_q=4
    )
    assert_same(found, dense(query, key, value, number[:, None] == number), (query, key, value))


def test_what_it_cannot_compute_is_refused() -> None:
    inputs, segments = tensors(3, 3), Segments(ends_of((3,)), (3,))
    with pytest.raises(ConfigError, match=r"dropout of 0\.1.*training\.packing to false"):
        packed_attention(Layer(), *inputs, None, dropout=0.1, segments=segments)
    with pytest.raises(ConfigError, match=r"softcap=50\.0.*training\.packing to false"):
        packed_attention(Layer(), *inputs, None, segments=segments, softcap=50.0)
