"""Has a live model take packed rows, for the length of a block.

A packed row carries its boundaries in one argument, ``packed_row``, beside the usual ones. A hook takes it off before
the model would see it, and another hands it to the language model's layers, whose attention is ours in the meantime:

    model(input_ids, position_ids, pixels, packed_row)
      └─ take ── equip ── vision tower (boundaries of images) ── give ── layers(…, segments=…) ── packed_attention

The boundaries go through the layers as an argument, so that recomputation in the backward pass, which runs on another
thread on a GPU, finds them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from vlm.families import Family
from vlm.packing.attention import LANGUAGE_ATTENTION, TOWER_ATTENTION, Segments, register

PACKED_ROW = "packed_row"


@contextmanager
def packed(model: Any, family: Family) -> Iterator[None]:
    """Lets the model take packed rows beside padded batches, and leaves it as it was.

    Args:
        model: The base model, with or without the layers of an adapter in it.
        family: Its row; must have packing.
    """
    packing = family.packing
    assert packing is not None, f"{family.model_type} cannot be packed"
    register()
    row: dict[str, Any] = {}

    calls: Iterator[dict[str, Any]] = iter(())

    def take(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal calls
        row.clear()
        rest = dict(kwargs)
        row.update(rest.pop(PACKED_ROW, {}))
        calls = iter(row.get("tower", ()))
        return args, rest

    def equip(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, **(next(calls) if row else {})}

    def give(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not row:
            return None
        segments = Segments(row["ends"], row["lengths"])
        # Of four dimensions, so that it is taken for a finished mask and none is built; of no element, so that whoever
        # would use it by mistake fails.
        mask = segments.ends_q.new_empty((1, 1, 1, 0))
        given = {**kwargs, "segments": segments, "attention_mask": mask, "use_cache": False}
        if packing.language_inputs is not None:
            given |= packing.language_inputs(model, row)
        row.clear()
        return args, given

    language = model.get_submodule(packing.language_model)
    outer = model.get_submodule(packing.language_model.rpartition(".")[0])
    with ExitStack() as stack:
        hooks: list[tuple[torch.nn.Module, Any]] = [(outer, take), (language, give)]
        if packing.tower_inputs is not None:
            hooks.append((model.get_submodule(packing.vision_tower), equip))
        for hooked, hook in hooks:
            stack.callback(hooked.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if packing.install is not None:
            for handle in packing.install(model):
                stack.callback(handle.remove)
        chosen = {"language": LANGUAGE_ATTENTION} | ({"vision": TOWER_ATTENTION} if packing.tower_segments else {})
        stack.enter_context(_attention(model, family, chosen))
        yield


@contextmanager
def _attention(model: Any, family: Family, chosen: dict[str, str]) -> Iterator[None]:
    """Sets the attention function of whole parts."""
    before: dict[int, tuple[Any, str]] = {}
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        part = family.part_of(name)
        if part in chosen and hasattr(config, "_attn_implementation_internal") and id(config) not in before:
            before[id(config)] = (config, config._attn_implementation_internal)
            # Not through the property, which would change nested configurations, too.
            config._attn_implementation_internal = chosen[part]
    try:
        yield
    finally:
        for config, implementation in before.values():
            config._attn_implementation_internal = implementation
