"""Layers as CUDA graphs: a layer's hundred launches become one, forward and backward.

At a few thousand tokens a step of a small model is the host's time, not the GPU's: Qwen2-VL-2B over eight formulas takes
0.33 s of which the GPU works 0.09 s. A graph replays fixed shapes at fixed addresses, so

    hidden [1, T, H]  ── copied, padded to T' ──▶ slot 0 ─ graph ─▶ slot 1 ─ graph ─▶ … ─▶ slot L ── first T ──▶ norm
    cos, sin, ends    ── copied once for all layers ──────┘                                              backward likewise

- T' is T rounded up by an eighth, or up to a size that was captured before. The padding is a segment of its own that
  nothing attends to and whose gradient is zero, and never NaN.
- Inputs of layers lie in slots that all shapes share; so does what a layer keeps, since memory of one capture is given to
  the next: of one stack of layers, only one shape is in flight.
- Gradients are added to buffers inside the graph; `grad` of a parameter is such a buffer.
- The first replay of each graph is compared with what the layer gave without it.
- A size is captured where no larger one will do, or where it has come a few times. A layer runs as it was where anything
  is in the way: inputs that are not known here, a stack called twice in one pass, an error while capturing. After an error
  there are no more graphs, and what they took is given back.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm.training.activation import LAUNCH_BOUND_OPERATIONS, ActivationPlan
from vlm.training.capture.layer import CapturedLayer, capturable
from vlm.training.capture.stack import Graph, Memory, Stack

__all__ = ["CapturedLayer", "Graph", "Memory", "Stack", "capturable", "graph_stacks"]


def graph_stacks(
    model: Any, plan: ActivationPlan, *, most_patches: int = 0, most_tokens: int = 0
) -> tuple[Stack, Stack] | None:
    """Stacks for the layers of vision tower and language model.

    Args:
        model: The model that learns, with its adapter.
        plan: What becomes of activations.
        most_patches: Of the largest micro-batch, as far as known.
        most_tokens: Likewise.

    Returns:
        None where graphs do not help or would change the result: on a CPU; with inputs in host memory, which is for steps
        that take long anyway; and with dropout, whose random numbers a recomputed layer must draw again.
    """
    drops = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    if not next(model.parameters()).is_cuda or plan.offload or drops:
        return None
    limit, memory = LAUNCH_BOUND_OPERATIONS, Memory()
    # Kept activations of one tower lie in its memory while the other one works.
    other = memory if plan.recomputes_all else Memory()
    vision = Stack(memory=memory, limit=limit, most_positions=most_patches)
    language = Stack(memory=other, limit=limit, most_positions=most_tokens)
    vision.companions, language.companions = [language], [vision]
    return vision, language
