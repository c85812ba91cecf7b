"""When layers are captured, which graph serves which row, and what happens where there can be none."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.rerun import Rerun
from vlm.packing.attention import Segments, ends_of
from vlm.training.activation import rounded
from vlm.training.capture import CapturedLayer, Stack
from vlm.training.capture.stack import Shape

WIDTH = 8


class Layer(nn.Module):
    """Works position by position."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, hidden_states: Tensor, angles: Any = None, **kwargs: Any) -> Tensor:
        return hidden_states + torch.tanh(self.linear(hidden_states))


class Tower:
    """Two layers behind a stack, and the same without."""

    def __init__(self, stack: Stack, *, recompute: bool = True) -> None:
        torch.manual_seed(0)
        self.stack = stack
        self.layers = [Layer(), Layer()]
        self.captured = [
            CapturedLayer(stack, own, own.forward, own.forward, recompute=recompute) for own in self.layers
        ]

    def run(self, layers: list[Any], length: int, **given: Any) -> list[Tensor]:
        """Output and gradients for a row of a length."""
        x = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(length))
        if "segments" in given:
            given["segments"] = Segments(ends_of([length]), [length])
        for layer in layers:
            x = layer(x, **given)
        (x * x).sum().backward()
        found = [x.detach().clone()]
        for layer in self.layers:
            found += [own.grad.clone() for own in layer.linear.parameters() if own.grad is not None]
            assert layer.idle.grad is None
            layer.zero_grad(set_to_none=True)
        return found

    def check(self, length: int, **given: Any) -> None:
        found, expected = self.run(self.captured, length, **given), self.run(self.layers, length, **given)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


PACKED: dict[str, Any] = {"segments": True}


def sizes(stack: Stack) -> list[int]:
    return sorted(shape.num_positions for shape in stack._shapes.values())


def test_rounded() -> None:
    assert [rounded(number) for number in (1, 64, 65, 1000, 1025, 1763)] == [64, 64, 128, 1024, 1152, 1792]


def test_a_larger_size_serves_until_one_comes_often() -> None:
    stack = Stack(Rerun, most_positions=500)
    tower = Tower(stack)
    for length in (300, 200, 290, 310):
        tower.check(length, **PACKED)
    assert sizes(stack) == [320]
    assert stack.num_replays == 8
    tower.check(200, **PACKED)
    assert sizes(stack) == [320]
    tower.check(200, **PACKED)
    assert sizes(stack) == [256, 320]
    # More than twice as large would waste too much.
    tower.check(60, **PACKED)
    assert sizes(stack) == [64, 256, 320]
    tower.check(500, **PACKED)
    assert sizes(stack) == [64, 256, 320, 512]
    assert not stack.reasons
    # Longer than was announced: all starts anew.
    tower.check(700, **PACKED)
    assert sizes(stack) == [704]
    for length in (500, 60, 700):
        tower.check(length, **PACKED)
    assert not stack.reasons


def test_without_boundaries_only_the_size_itself() -> None:
    stack = Stack(Rerun)
    tower = Tower(stack)
    for length in (50, 40, 50, 40):
        tower.check(length)
    assert sizes(stack) == [40, 50]


def test_what_is_not_known_goes_without() -> None:
    stack = Stack(Rerun)
    tower = Tower(stack)
    tower.check(50, angles=torch.ones(3))
    assert stack.reasons == {"input angles": 2}
    small = Stack(Rerun, limit=100.0)
    Tower(small).check(50, **PACKED)
    assert small.reasons == {"large": 2}


def test_a_tower_called_twice_in_one_pass() -> None:
    stack = Stack(Rerun)
    tower = Tower(stack)
    first = torch.randn(1, 30, WIDTH)
    tower.check(64)

    def both(layers: list[Any]) -> list[Tensor]:
        outputs = []
        for row in (first, first[:, :20]):
            for layer in layers:
                row = layer(row)
            outputs.append(row.sum())
        (outputs[0] * outputs[1]).backward()
        found = [own.grad.clone() for layer in tower.layers for own in layer.linear.parameters()]
        for layer in tower.layers:
            layer.zero_grad(set_to_none=True)
        return found

    for found, expected in zip(both(tower.captured), both(tower.layers), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert stack.reasons["called twice"] == 1


def failing(at: int) -> type[Rerun]:
    """Graphs of which one cannot be recorded."""
    recorded = []

    class Failing(Rerun):
        def capture(self, function: Callable[[], None]) -> None:
            recorded.append(function)
            if len(recorded) >= at:
                raise RuntimeError("operation not permitted when stream is capturing")
            super().capture(function)

    return Failing


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_what_cannot_be_recorded_runs_all_the_same(at: int, caplog: pytest.LogCaptureFixture) -> None:
    stack = Stack(failing(at))
    tower = Tower(stack)
    for _ in range(3):
        tower.check(50, **PACKED)
    assert stack.disabled
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "operation not permitted" in caplog.text
    assert not stack.has_graphs
    assert not stack._slots
    assert not any(layer.buffers for layer in tower.captured)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("short_of_memory", [False, True])
@pytest.mark.parametrize("at", [5, 6, 7, 8])  # graphs of the second stack: way forward, and way back
def test_what_graphs_took_is_given_back(at: int, short_of_memory: bool, recompute: bool) -> None:
    """The second of two towers fails, while the way back of the first, captured before, is still to come."""
    num_recorded = 0
    graphs: list[weakref.ref[Any]] = []

    class Counted(Rerun):
        def capture(self, function: Callable[[], None]) -> None:
            nonlocal num_recorded
            num_recorded += 1
            if num_recorded == at:
                raise torch.OutOfMemoryError("out of memory") if short_of_memory else RuntimeError("not permitted")
            super().capture(function)
            graphs.append(weakref.ref(self))

    stacks = [Stack(Counted), Stack(Counted)]
    stacks[0].companions, stacks[1].companions = [stacks[1]], [stacks[0]]
    towers = [Tower(stack, recompute=recompute) for stack in stacks]
    towers[0].check(50, **PACKED)
    assert num_recorded == 4
    first = list(graphs)
    for _ in range(3):
        x = torch.randn(1, 50, WIDTH)
        outputs = []
        for captured in (True, False):
            y = x
            for tower in towers:
                for layer in tower.captured if captured else tower.layers:
                    y = layer(y, segments=Segments(ends_of([50]), [50]))
            (y * y).sum().backward()
            own = [parameter for tower in towers for layer in tower.layers for parameter in layer.linear.parameters()]
            outputs.append([y.detach().clone(), *(parameter.grad.clone() for parameter in own)])
            for parameter in own:
                parameter.grad = None
        for one, other in zip(*outputs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert [stack.disabled for stack in stacks] == [short_of_memory, True]
    del y
    gc.collect()
    alive = [graph for graph in graphs if graph() is not None]
    # The first tower's graphs live on where memory was not the reason.
    assert alive == ([] if short_of_memory else first)
    for stack in stacks:
        assert stack.has_graphs == (not stack.disabled)
        assert bool(stack._slots) == (not stack.disabled)


def test_a_replay_that_is_wrong_is_not_used() -> None:
    class Spoilt(Rerun):
        def capture(self, function: Callable[[], None]) -> None:
            owner = function.__self__  # type: ignore[attr-defined]
            super().capture(lambda: (function(), owner.y.add_(1)))  # type: ignore[arg-type, return-value]

    stack = Stack(Spoilt)
    tower = Tower(stack)
    tower.check(50, **PACKED)
    assert stack.disabled
    assert any("off" in reason for reason in stack.reasons)


def test_a_pass_that_was_broken_off_is_captured_anew() -> None:
    stack = Stack(Rerun)
    tower = Tower(stack)
    x = torch.randn(1, 50, WIDTH)
    for layer in tower.captured:
        x = layer(x)
    del x  # never goes back
    assert not next(iter(stack._shapes.values())).complete
    before: Shape = next(iter(stack._shapes.values()))
    tower.check(50)
    assert next(iter(stack._shapes.values())) is not before


def test_passes_that_use_other_parameters_add_up() -> None:
    class Optional(Layer):
        def forward(self, hidden_states: Tensor, shifted: bool = False) -> Tensor:
            return super().forward(hidden_states) + (self.idle.sum() if shifted else 0)

    layer, x = Optional(), torch.randn(1, 50, WIDTH)
    captured = CapturedLayer(Stack(Rerun), layer, layer.forward, layer.forward, recompute=True)

    def gradients(call: Any) -> list[Tensor]:
        # The second pass uses a parameter more.
        for row, shifted in ((x, False), (2 * x, True)):
            call(row, shifted=shifted).square().sum().backward()
        found = [own.grad.clone() for own in layer.parameters() if own.grad is not None]
        layer.zero_grad(set_to_none=True)
        return found

    for _ in range(2):
        for found, expected in zip(gradients(captured), gradients(layer), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert captured.stack.num_replays == 4
