"""Which rotary embeddings of model files are swapped, told by what they compute."""

from __future__ import annotations

import sys
import types
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from vlm.kernels.rotary_install import install_rotary

Rotated = tuple[torch.Tensor, torch.Tensor]


def halves(x: torch.Tensor) -> torch.Tensor:
    middle = x.shape[-1] // 2
    return torch.cat((-x[..., middle:], x[..., :middle]), -1)


def neighbours(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).reshape(x.shape)


def backwards(x: torch.Tensor) -> torch.Tensor:
    return -halves(x)


def file_of(turn: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, torch.nn.Module]:
    """A model file with both functions, which rotate as many values as there are angles, and a model out of it."""

    def part(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, missing: int) -> torch.Tensor:
        cos, sin = cos.unsqueeze(missing), sin.unsqueeze(missing)
        head, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat((head * cos + turn(head) * sin, rest), -1)

    def language(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Rotated:
        return part(q, cos, sin, unsqueeze_dim), part(k, cos, sin, unsqueeze_dim)

    def vision(q: Any, k: Any, cos: Any, sin: Any) -> Rotated:
        return part(q, cos, sin, -2), part(k, cos, sin, -2)

    file: Any = types.ModuleType("file_of_a_model")
    file.apply_rotary_pos_emb, file.apply_rotary_pos_emb_vision = language, vision
    file.Model = type("Model", (torch.nn.Module,), {"__module__": file.__name__})
    monkeypatch.setitem(sys.modules, file.__name__, file)
    return file, file.Model()


@pytest.mark.parametrize("turn", [halves, neighbours])
def test_what_is_swapped_computes_the_same(turn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, model = file_of(turn, monkeypatch)
    stock = (file.apply_rotary_pos_emb, file.apply_rotary_pos_emb_vision)
    torch.manual_seed(0)
    q, k, tower_q, tower_k = (torch.randn(s) for s in ((2, 4, 5, 12), (2, 1, 5, 12), (5, 4, 12), (5, 4, 12)))
    # All of a head, and two thirds of it.
    cases = [(torch.randn(2, 5, width), torch.randn(2, 5, width)) for width in (12, 8)]
    with ExitStack() as stack:
        assert install_rotary(model, stack) == 2
        swapped = (file.apply_rotary_pos_emb, file.apply_rotary_pos_emb_vision)
        for cos, sin in cases:
            rows = (q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            for own, other in zip(swapped, stock, strict=True):
                assert own is not other
            torch.testing.assert_close(swapped[0](q, k, cos, sin), stock[0](q, k, cos, sin))
            torch.testing.assert_close(swapped[0](*rows, unsqueeze_dim=2), stock[0](*rows, unsqueeze_dim=2))
            torch.testing.assert_close(
                swapped[1](tower_q, tower_k, cos[0], sin[0]), stock[1](tower_q, tower_k, cos[0], sin[0])
            )
    assert (file.apply_rotary_pos_emb, file.apply_rotary_pos_emb_vision) == stock


def test_another_rotation_stays(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    file, model = file_of(backwards, monkeypatch)
    stock = (file.apply_rotary_pos_emb, file.apply_rotary_pos_emb_vision)
    with caplog.at_level("INFO"), ExitStack() as stack:
        assert install_rotary(model, stack) == 0
        assert (file.apply_rotary_pos_emb, file.apply_rotary_pos_emb_vision) == stock
    assert "file_of_a_model stays" in caplog.text
