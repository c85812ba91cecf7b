"""Random inputs for kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def random() -> Callable[..., torch.Tensor]:
    """Gives normal tensors, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    torch.set_num_threads(1)

    def make(*shape: int, scale: float = 1.0, learns: bool = False) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).requires_grad_(learns)

    return make


@pytest.fixture
def stored() -> Iterator[Callable[[], list[torch.Tensor]]]:
    """Watches which tensors autograd keeps."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: kept
