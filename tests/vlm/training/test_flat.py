"""An optimiser over slices of one long tensor against the same over the parameters."""

import copy
import io
import math
from typing import Any

import pytest
import torch

from vlm.training.flat import FlatParameters


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (300,), (2, 2, 2), (7, 40)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def optimizer_of(own: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": own[:2], "weight_decay": 0.1},
        {"params": []},
        {"params": own[2:], "lr": 0.05, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01)


def go_backward(own: list[torch.nn.Parameter], step: int) -> None:
    """Gives all parameters but the last in even steps a gradient, in two parts."""
    generator = torch.Generator().manual_seed(step)
    for parameter in own[: len(own) - 1 + step % 2] * 2:
        (parameter * torch.randn(parameter.shape, generator=generator)).sum().backward()


def test_steps_are_the_same_to_the_bit_also_when_resumed() -> None:
    apart, sliced = parameters(), parameters()
    plain, flat_optimizer = optimizer_of(apart), optimizer_of(sliced)
    flat = FlatParameters(flat_optimizer)
    assert [len(group["params"]) for group in flat_optimizer.param_groups] == [1, 1]
    for step in range(6):
        if step == 3:
            buffer = io.BytesIO()
            torch.save(flat_optimizer.state_dict(), buffer)
            buffer.seek(0)
            sliced = [torch.nn.Parameter(own.detach().clone()) for own in sliced]
            flat_optimizer = optimizer_of(sliced)
            flat = FlatParameters(flat_optimizer)
            flat_optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        flat.begin()
        for parameter in apart:
            # What no gradient came for counts as zero.
            parameter.grad = torch.zeros_like(parameter)
        go_backward(apart, step)
        go_backward(sliced, step)
        plain.step()
        flat_optimizer.step()
        for one, other in zip(apart, sliced, strict=True):
            assert torch.equal(one, other)
            other.grad = None
        if step % 2:
            flat_optimizer.zero_grad(set_to_none=True)


def test_a_missing_gradient_is_zero_and_remembered() -> None:
    own = parameters()
    before = copy.deepcopy(own[3])
    optimizer = optimizer_of(own)
    flat = FlatParameters(optimizer)
    names = {str(number): parameter for number, parameter in enumerate(own)}
    assert flat.without_gradient(names) == ["0", "1", "2", "3"]
    for _ in range(2):
        flat.begin()
        go_backward(own, 0)
        optimizer.step()
    # Of the group without decay.
    assert torch.equal(own[3], before)
    assert flat.without_gradient(names) == ["3"]
    again = parameters()
    other = optimizer_of(again)
    restored = FlatParameters(other)
    other.load_state_dict(optimizer.state_dict())
    assert restored.without_gradient({str(number): parameter for number, parameter in enumerate(again)}) == ["3"]


@pytest.mark.parametrize("max_norm", [0.5, 1e9, math.inf])
def test_gradients_are_clipped_as_torch_clips_them(max_norm: float) -> None:
    apart, sliced = parameters(), parameters()
    flat = FlatParameters(optimizer_of(sliced))
    flat.begin()
    go_backward(apart, 1)
    go_backward(sliced, 1)
    expected = torch.nn.utils.clip_grad_norm_(apart, max_norm)
    assert expected > 1
    # One sum of squares in place of a sum of sums.
    torch.testing.assert_close(flat.clip(max_norm), expected, rtol=1e-6, atol=0)
    for one, other in zip(apart, sliced, strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=0)
