"""Putting the fused pieces into a live model for the length of a training.

What is found, by structure and not by class:

- **LoRA layers** of peft over a frozen dense or 4-bit layer. Dropout, DoRA, biases of the update, several adapters at
  once and 8-bit layers stay with peft.
- **Feed-forward blocks**, gated or plain, all of whose projections are frozen linear layers or such LoRA layers.
- **RMSNorms and LayerNorms** whose weights are frozen.
- **Rotary embedding** of queries and keys, where Triton runs (`vlm.kernels.rotary_install`).

What was found and what was left, and why, goes to the log. At the end of the block the model is as before.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vlm.families import Family
from vlm.kernels.frozen_linear import Projection
from vlm.kernels.layer_norm import layer_norm
from vlm.kernels.lora_linear import lora_linear
from vlm.kernels.mlp import Adapted, mlp
from vlm.kernels.rms_norm import rms_norm
from vlm.kernels.rotary_install import install_rotary
from vlm.kernels.triton_use import use_triton

Piece = Literal["linear", "mlp", "norm", "rotary"]
PIECES: tuple[Piece, ...] = get_args(Piece)

_LOGGER = logging.getLogger(__name__)
# Children of a feed-forward block: gate (None in a plain one), up, down.
_BLOCKS = (
    ("gate_proj", "up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "lin1", "lin2"),
    (None, "linear_fc1", "linear_fc2"),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act")


@dataclass
class FusedReport:
    """What was fused, and what was left as it was.

    Attributes:
        fused: Number of places by piece.
        left: Number of LoRA layers by the reason why they stay with peft.
    """

    fused: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """One line for the log."""
        done = ", ".join(f"{count} {piece}" for piece, count in sorted(self.fused.items())) or "nothing"
        kept = ", ".join(f"{count} LoRA layers ({reason})" for reason, count in sorted(self.left.items()))
        return f"fused: {done}" + (f"; left to peft: {kept}" if kept else "")


@contextmanager
def fused(model: Any, family: Family, pieces: Collection[Piece] = PIECES) -> Iterator[FusedReport]:
    """Replaces what is found by its fused form for the length of a block.

    Args:
        model: The base model, with or without an adapter on it.
        family: Its row of the table, whose patterns say which modules are feed-forward projections.
        pieces: Which pieces to fuse.

    Yields:
        What was done.
    """
    report = FusedReport()
    with ExitStack() as stack:
        if "linear" in pieces or "mlp" in pieces:
            _install_projections(model, family, pieces, report, stack)
        if "norm" in pieces:
            for module in model.modules():
                if _is_frozen_rms_norm(module):
                    _replace_forward(module, partial(_norm_forward, module), stack)
                    report.fused["norm"] += 1
                elif _is_frozen_layer_norm(module):
                    _replace_forward(module, partial(_layer_norm_forward, module), stack)
                    report.fused["norm"] += 1
        if "rotary" in pieces and use_triton(next(model.parameters())):
            report.fused["rotary"] = install_rotary(model, stack)
        _LOGGER.info("%s", report)
        yield report


def _install_projections(
    model: Any, family: Family, pieces: Collection[Piece], report: FusedReport, stack: ExitStack
) -> None:
    is_feed_forward = re.compile(f"{family.language_mlp}|{family.vision_mlp}").fullmatch
    for name, module in model.named_modules():
        if "linear" in pieces and _is_lora(module):
            reason = _why_not(module)
            if reason is None:
                _replace_forward(module, partial(_linear_forward, _lora_place(module), module.forward), stack)
                report.fused["linear"] += 1
            else:
                report.left[reason] += 1
        if "mlp" in pieces:
            names = _block_names(module)
            if names is None or not all(is_feed_forward(f"{name}.{child}") for child in names if child):
                continue
            activation = next((getattr(module, word) for word in _ACTIVATIONS if hasattr(module, word)), None)
            gate, up, down = (_place(getattr(module, child)) if child else None for child in names)
            if activation is None or up is None or down is None or (gate is None and names[0] is not None):
                continue
            _replace_forward(module, partial(_mlp_forward, module.forward, gate, up, down, activation), stack)
            report.fused["mlp"] += 1


def _replace_forward(module: Any, forward: Callable[..., Any], stack: ExitStack) -> None:
    own = module.__dict__.get("forward")

    def restore() -> None:
        module.__dict__.pop("forward", None)
        if own is not None:
            module.forward = own

    module.forward = forward
    stack.callback(restore)


def _is_lora(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer) and hasattr(module, "lora_A") and hasattr(module.get_base_layer(), "weight")


def _is_plain_linear(module: Any) -> bool:
    import bitsandbytes as bnb

    # Exact types: what is derived from them may compute something else.
    return type(module) in (torch.nn.Linear, bnb.nn.Linear4bit)


def _why_not(layer: Any) -> str | None:
    """Why a LoRA layer stays with peft; None if it can be fused."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.bnb import Linear4bit

    base = layer.get_base_layer()
    if type(layer) not in (Linear, Linear4bit) or not _is_plain_linear(base) or layer.fan_in_fan_out:
        return f"base is {type(base).__name__}"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} active adapters"
    if layer.lora_variant.get(active[0]) is not None:
        return "DoRA or another variant"
    if not isinstance(layer.lora_dropout[active[0]], torch.nn.Identity):
        return "dropout"
    if layer.lora_B[active[0]].bias is not None or any(parameter.requires_grad for parameter in base.parameters()):
        return "a bias or the base learns"
    return None


@dataclass(frozen=True, eq=False)
class _Place:
    """A projection as it was found. What may change during a training is read anew in every pass."""

    projection: Projection
    layer: Any = None
    a: Any = None
    b: Any = None

    def adapted(self) -> Adapted | None:
        """The projection and its matrices; None where peft has the update merged into the weight."""
        if self.layer is None or self.layer.disable_adapters:
            return self.projection, None, None
        return None if self.layer.merged else (self.projection, self.a.weight, self.b.weight)


def _lora_place(layer: Any) -> _Place:
    adapter = next(name for name in layer.active_adapters if name in layer.lora_A)
    projection = Projection(layer.get_base_layer(), layer.scaling[adapter])
    return _Place(projection, layer, layer.lora_A[adapter], layer.lora_B[adapter])


def _place(module: Any) -> _Place | None:
    """A projection of a feed-forward block; None where it cannot be fused."""
    if _is_lora(module):
        return _lora_place(module) if _why_not(module) is None else None
    if _is_plain_linear(module) and not any(parameter.requires_grad for parameter in module.parameters()):
        return _Place(Projection(module))
    return None


def _linear_forward(place: _Place, stock: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapted = place.adapted()
    if args or kwargs or adapted is None:
        return stock(x, *args, **kwargs)
    return lora_linear(x, *adapted)


def _block_names(module: Any) -> tuple[str | None, str, str] | None:
    children = module._modules
    for names in _BLOCKS:
        if all(name in children for name in names if name):
            return names
    return None


def _mlp_forward(
    stock: Callable[..., Tensor],
    gate: _Place | None,
    up: _Place,
    down: _Place,
    activation: Callable[[Tensor], Tensor],
    x: Tensor,
) -> Tensor:
    up_now, down_now = up.adapted(), down.adapted()
    gate_now = None if gate is None else gate.adapted()
    if up_now is None or down_now is None or (gate is not None and gate_now is None):
        return stock(x)
    return mlp(x, up_now, down_now, gate_now, activation)


def _is_frozen_rms_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and hasattr(module, "variance_epsilon")
        and weight is not None
        and not weight.requires_grad
    )


def _is_frozen_layer_norm(module: Any) -> bool:
    return (
        # The exact type: what is derived from it may normalise another dimension.
        type(module) is torch.nn.LayerNorm
        and len(module.normalized_shape) == 1
        and module.weight is not None
        and not any(parameter.requires_grad for parameter in module.parameters())
    )


def _layer_norm_forward(module: Any, x: Tensor) -> Tensor:
    return layer_norm(x, module.weight, module.bias, module.eps)


def _norm_forward(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon)
