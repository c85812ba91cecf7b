"""The head's loss against whole logits and torch's own cross-entropy."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

from vlm.kernels import head_loss as module
from vlm.kernels.head_loss import head_loss, head_loss_eager

Random = Callable[..., torch.Tensor]
NUM_WORDS = 101


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows at a time, so that a few rows make several chunks and a short one."""
    monkeypatch.setattr(module, "chunk_rows", lambda num_words: 7)


def frozen(random: Random, *, bias: bool) -> Any:
    return torch.nn.Linear(32, NUM_WORDS, bias=bias).requires_grad_(False)


def learning(random: Random, *, bias: bool) -> Any:
    return torch.nn.Linear(32, NUM_WORDS, bias=bias)


def adapted(random: Random, *, bias: bool) -> Any:
    parent = torch.nn.Module()
    parent.lm_head = torch.nn.Linear(32, NUM_WORDS, bias=bias)
    config = peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, parent).lm_head


@pytest.mark.parametrize("make", [frozen, learning, adapted])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_rows", [20, 7, 1])
def test_loss_and_gradients(random: Random, make: Callable[..., Any], bias: bool, num_rows: int) -> None:
    torch.manual_seed(2)
    head = make(random, bias=bias)
    h = random(num_rows, 32, learns=True)
    targets = torch.arange(num_rows) * 5 % NUM_WORDS
    inputs = [h, *(parameter for parameter in head.parameters() if parameter.requires_grad)]
    results = []
    for function in (head_loss, head_loss_eager):
        total, num_right = function(h, head, targets)
        # Scaled as by the number of tokens in a step.
        results.append((total.detach(), num_right, torch.autograd.grad(total / 13, inputs)))
    (total, num_right, gradients), (expected_total, expected_right, expected) = results
    # Sums over at most 20 rows and 101 words in float32.
    torch.testing.assert_close(total, expected_total, rtol=1e-6, atol=0)
    assert num_right == expected_right
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("make", [frozen, learning, adapted])
def test_no_labels_give_a_sum_with_zero_gradient(random: Random, make: Callable[..., Any]) -> None:
    head = make(random, bias=False)
    h = random(0, 32, learns=True)
    total, _ = head_loss(h, head, torch.zeros(0, dtype=torch.int64))
    assert total == 0
    (total * 2).backward()
    assert h.grad is not None


def test_logits_are_never_whole(random: Random, stored: Callable[[], list[torch.Tensor]]) -> None:
    head = frozen(random, bias=False)
    head_loss(random(20, 32, learns=True), head, torch.zeros(20, dtype=torch.int64))
    assert [tuple(tensor.shape) for tensor in stored()] == [(20, 32)]
    largest = most_at_once = 0
    chunks: list[weakref.ref[torch.Tensor]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest, most_at_once
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                # The head itself is [words, 32], and turned round [32, words].
                if isinstance(tensor, torch.Tensor) and NUM_WORDS in tensor.shape and 32 not in tensor.shape:
                    largest = max(largest, tensor.numel() // NUM_WORDS)
                    chunks.append(weakref.ref(tensor))
            alive = {chunk.data_ptr() for reference in chunks if (chunk := reference()) is not None}
            most_at_once = max(most_at_once, len(alive))
            return result

    with Watch():
        head_loss(random(20, 32, learns=True), head, torch.zeros(20, dtype=torch.int64))
    assert largest == 7
    # In float32 even the narrow copy is the chunk itself.
    assert most_at_once == 1


def test_a_second_backward_pass_is_refused_and_not_scaled_twice(random: Random) -> None:
    head = learning(random, bias=False)
    total, _ = head_loss(random(20, 32, learns=True), head, torch.zeros(20, dtype=torch.int64))
    (total * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (total * 2).backward()


def test_a_head_of_many_words_has_its_gradient_made_in_parts(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = torch.arange(20)
    gradients = []
    for words in (2**14, 7):
        monkeypatch.setattr("vlm.kernels.head_loss._WORDS", words)
        torch.manual_seed(3)
        head = learning(random, bias=False)
        head_loss(torch.randn(20, 32), head, targets)[0].backward()
        gradients.append(head.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_evaluation_makes_no_gradient(random: Random, stored: Callable[[], list[torch.Tensor]]) -> None:
    head = frozen(random, bias=False)
    with torch.no_grad():
        total, _ = head_loss(random(20, 32, learns=True), head, torch.zeros(20, dtype=torch.int64))
    assert not total.requires_grad
    assert stored() == []


def test_half_precision_is_summed_in_float32(random: Random) -> None:
    torch.manual_seed(2)
    head = frozen(random, bias=False)
    h = random(20, 32, learns=True)
    targets = torch.arange(20)
    expected, _ = head_loss_eager(h, head, targets)
    found, _ = head_loss(h.half(), head.half(), targets)
    assert found.dtype == torch.float32
    # Inputs and logits rounded to 11 bits.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
