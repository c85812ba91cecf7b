"""Swapping the rotary embedding of transformers' model files for the fused one, for the length of a block.

The files share the names of their functions, not the arithmetic: most rotate the halves of a head, GLM's language model
rotates neighbours. So each function is asked by an example before it is replaced; one that does neither stays.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlm.kernels.rotary import rotary, rotary_eager

_LOGGER = logging.getLogger(__name__)
# The functions of transformers' model files, and the dimension of x that their angles lack unless told otherwise.
_NAMES = {"apply_rotary_pos_emb": 1, "apply_rotary_pos_emb_vision": -2}
_Rotate = Callable[..., tuple[Tensor, Tensor]]


def install_rotary(model: Any, stack: ExitStack) -> int:
    """Swaps the functions of the files in which a model's classes are written.

    Args:
        model: The base model.
        stack: Puts them back when it closes.

    Returns:
        Number of functions that were swapped.
    """
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    count = 0
    for file in files:
        for name, dimension in _NAMES.items():
            stock = getattr(file, name, None)
            if stock is None or list(inspect.signature(stock).parameters)[:4] != ["q", "k", "cos", "sin"]:
                continue
            interleaved = is_interleaved(stock, dimension)
            if interleaved is None:
                _LOGGER.info("rotary embedding of %s stays: it rotates neither halves nor neighbours", file.__name__)
                continue
            setattr(file, name, partial(_forward, stock, rotary, dimension, interleaved))
            stack.callback(setattr, file, name, stock)
            count += 1
    return count


def is_interleaved(stock: _Rotate, dimension: int) -> bool | None:
    """Whether a function rotates neighbours (True) or halves (False); None for anything else.

    Args:
        stock: Takes q, k, cos and sin.
        dimension: The dimension of q that cos and sin lack.
    """
    generator = torch.Generator().manual_seed(0)
    # No two values are alike, so that no other order passes.
    shapes = [(1, 4, 3, 8), (1, 2, 3, 8)] if dimension == 1 else [(3, 4, 8), (3, 2, 8)]
    angles = [(1, 3, 8)] * 2 if dimension == 1 else [(3, 8)] * 2
    example = [torch.randn(shape, generator=generator) for shape in (*shapes, *angles)]
    with torch.no_grad():
        expected = stock(*example)
        for interleaved in (False, True):
            found = _forward(stock, rotary_eager, dimension, interleaved, *example)
            # float32, and a product or sum that may be rounded once or twice.
            if all(
                one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-5)
                for one, other in zip(found, expected, strict=True)
            ):
                return interleaved
    return None


def _forward(
    stock: _Rotate,
    rotate: _Rotate,
    dimension: int,
    interleaved: bool,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Brings q and k to [batch, heads, sequence, width], the angles to [batch or 1, sequence, width], and the result back."""
    missing = dimension if unsqueeze_dim is None else unsqueeze_dim
    if cos.shape[-1] != q.shape[-1]:
        # A part of each head is rotated.
        return stock(q, k, cos, sin, *(() if unsqueeze_dim is None else (unsqueeze_dim,)))
    # Vision towers give [sequence, heads, width], whose angles lack the dimension in front of the width.
    heads_second_last = missing in (-2, q.ndim - 2)
    if cos.ndim == 2:
        cos, sin = cos[None], sin[None]
    shaped = [x if x.ndim == 4 else x[None] for x in (q, k)]
    if heads_second_last:
        shaped = [x.transpose(1, 2) for x in shaped]
    shaped = list(rotate(shaped[0], shaped[1], cos, sin, interleaved=interleaved))
    if heads_second_last:
        shaped = [x.transpose(1, 2) for x in shaped]
    # Not `[0]`, whose gradient would be copied into zeros.
    return (shaped[0], shaped[1]) if q.ndim == 4 else (shaped[0].squeeze(0), shaped[1].squeeze(0))
