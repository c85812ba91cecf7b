"""Names and layouts of weights in files, by transformers' own rules.

transformers stores many models under older names than their modules have (``visual.`` for ``model.visual.``), and some
weights joined or cut. Two layouts matter here:

    live     model.language_model.layers.1.mlp.experts.gate_up_proj        the model's own names
    ours     model.layers.1.mlp.experts.gate_up_proj                       older names, weights as they are: `save_model`
    Hub      model.layers.1.mlp.experts.0.gate_proj.weight, ...            older names and layout: merged exports

Imports torch and transformers when its functions are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@contextmanager
def without_conversions(model: PreTrainedModel) -> Iterator[None]:
    """For the length of a block, transformers turns back the names of this model's weights but not their layout."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    model_: Any = model
    before = getattr(model_, "_weight_conversions", None)
    rules = before
    if rules is None:
        # As transformers itself does for a model that was not read from a file.
        rules = [
            rule for rule in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(rule, PrefixChange)
        ]
    model_._weight_conversions = [rule for rule in rules if not isinstance(rule, WeightConverter)] or None
    try:
        yield
    finally:
        model_._weight_conversions = before


def older_names(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """The names in our files.

    Args:
        model: May be without storage (on the meta device).
        names: Full names in the live model, of weights or of what is named after them.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    # Each name travels as a number, so that it is found again whatever happens to it.
    numbered = {name: torch.tensor([number]) for number, name in enumerate(names)}
    with without_conversions(model):
        stored = revert_weight_conversion(model, numbered)
    keys = {int(number): key for key, number in stored.items()}
    return [keys[number] for number in range(len(names))]


def hub_groups(model: PreTrainedModel) -> list[tuple[str, ...]]:
    """Weights of a model that belong together in the Hub's layout, such as three projections stored as one.

    Args:
        model: On the meta device.

    Returns:
        Full names in the live model, each in one group; nearly all groups have one.
    """
    group_of: dict[str, list[str]] = {}
    groups: list[list[str]] = []
    for name, tensor in model.state_dict().items():
        keys = to_hub_layout(model, {name: tensor})
        group = next((group_of[key] for key in keys if key in group_of), None)
        if group is None:
            group = []
            groups.append(group)
        group.append(name)
        group_of.update(dict.fromkeys(keys, group))
    return [tuple(group) for group in groups]


def to_hub_layout(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Some of a model's weights in the Hub's layout.

    Args:
        model: May be without storage.
        tensors: By full name in the live model; whole groups of `hub_groups`.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))
