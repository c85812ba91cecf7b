"""The language-model head and cross-entropy over labelled positions, without logits ever being whole.

    ℓ = Σᵢ (log Σᵥ exp zᵢᵥ − zᵢ,ₜ₍ᵢ₎)     z = h Wᵀ + b     dz = softmax(z) − onehot(t)     dh = dz W     dW = dzᵀ h     db = Σᵢ dzᵢ

Legend: h [M, H] hidden states at labelled positions, t [M] their targets, W [V, H] the head, z [M, V] the logits, made
for a few rows at a time. A sum of losses can have its gradient made in the forward pass, while a chunk's logits are
there: two products with W instead of three. Softmax and sums are in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from vlm.kernels.frozen_linear import compute_dtype
from vlm.kernels.limits import HEAD_CHUNK_BYTES

# Of the head's gradient that are made at once.
_WORDS = 2**14


def chunk_rows(num_words: int) -> int:
    """Rows whose logits are made at once.

    Args:
        num_words: Size of the vocabulary.
    """
    return max(16, HEAD_CHUNK_BYTES // (4 * num_words))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        needs_h, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dense = weight.to(h.dtype)
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        num_right = torch.zeros((), dtype=torch.int64, device=h.device)
        dh = torch.empty_like(h) if needs_h else None
        # Over thousands of rows, sums in 16 bit would lose the small terms.
        dweight = torch.zeros(weight.shape, dtype=torch.float32, device=h.device) if needs_weight else None
        dbias = torch.zeros(len(weight), dtype=torch.float32, device=h.device) if needs_bias else None
        rows = chunk_rows(len(weight))
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            z = torch.nn.functional.linear(h[part], dense, None if bias is None else bias.to(h.dtype)).float()
            target = targets[part, None]
            top, likeliest = z.max(-1, keepdim=True)
            num_right += (likeliest == target).sum()
            # In the memory of z, one step after another: the copies of a whole chunk are what costs memory here.
            of_target = z.gather(1, target).sub_(top)
            dz = z.sub_(top).exp_()
            sums = dz.sum(-1, keepdim=True)
            total += (sums.log() - of_target).sum()
            if not (needs_h or needs_weight or needs_bias):
                del z, dz
                continue
            dz.div_(sums)
            dz.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
            narrow = dz.to(h.dtype)
            if dh is not None:
                torch.mm(narrow, dense, out=dh[part])
            if dweight is not None:
                # A few words at a time: all at once, the product would take half as much memory as the sum.
                for words in range(0, len(weight), _WORDS):
                    own = slice(words, words + _WORDS)
                    dweight[own] += narrow[:, own].t() @ h[part]
            if dbias is not None:
                dbias += dz.sum(0)
            # Or they would live until the next chunk's have been made.
            del z, dz, narrow
        ctx.save_for_backward(dh, dweight, dbias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(num_right)
        return total, num_right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        dh, dweight, dbias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if dh is None else dh * scale.to(dh.dtype),
            # In its own memory, which is that of a whole head in float32. A second backward pass would be refused.
            None if dweight is None else dweight.mul_(scale).to(weight_dtype),
            None if dbias is None else dbias.mul_(scale).to(bias_dtype),
            None,
        )


def head_loss(h: Tensor, head: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sums the cross-entropy over labelled positions.

    Args:
        h: Tensor of shape [M, H], the hidden states there.
        head: The head's module. A plain `torch.nn.Linear` takes the short way above; any other (adapted, quantised) is
            called chunk by chunk under recomputation, which costs one product more.
        targets: Tensor of shape [M], the words that should have come next.

    Returns:
        The sum, a scalar in float32, and the number of positions whose likeliest word is the target.
    """
    h = h.to(compute_dtype(h))
    if type(head) is torch.nn.Linear and head.weight.is_floating_point():
        with torch.autocast(h.device.type, enabled=False):
            total, num_right = _HeadLoss.apply(h, head.weight, head.bias, targets)
        return total, num_right
    total = torch.zeros((), dtype=torch.float32, device=h.device)
    num_right = torch.zeros((), dtype=torch.int64, device=h.device)
    rows = chunk_rows(head.out_features)
    # At least one pass, so that the sum belongs to the graph even where nothing is labelled.
    for start in range(0, max(1, len(h)), rows):
        part = slice(start, start + rows)
        if torch.is_grad_enabled():
            loss, right = checkpoint(_chunk, head, h[part], targets[part], use_reentrant=False)
        else:
            loss, right = _chunk(head, h[part], targets[part])
        total, num_right = total + loss, num_right + right
    return total, num_right


def _chunk(head: Any, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    z = head(h).float()
    return torch.nn.functional.cross_entropy(z, targets, reduction="sum"), (z.argmax(-1) == targets).sum()


def head_loss_eager(h: Tensor, head: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same from whole logits, as oracle.

    Args:
        h: As above.
        head: As above.
        targets: As above.
    """
    return _chunk(head, h, targets)
