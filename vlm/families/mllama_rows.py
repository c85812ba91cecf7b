"""Batches of Llama 3.2 Vision in which every row gives what it gives alone.

transformers pads the images of a batch to the row with the most. A text position that no image belongs to (before the
first image, or in a row without images) has all its keys masked, which transformers turns into *none masked*: it then
looks at every image of its row, padding included. So

    a row with images   looks, at such positions, at its images and at the padding, whose number depends on the batch
    a row without any   looks at padding alone; by itself it would skip the layer

and a row's outputs change with its neighbours. The two hooks here hide the padding from the first kind and switch the
cross-attention off for the second. What remains is, for each row, what stock transformers computes for that row alone
(its positions before the first image included, which do see the row's images there).

A third hook hands image features to the projector in three dimensions. The tower's two encoders would hold the outputs of
all of their 40 layers until the last has run (0.13 GB each over eight images), of which five are asked for: here they hold
those. torch is imported when a hook runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

_ROWS = "rows_with_images"


def keep_rows_apart(model: Any) -> None:
    """Puts the hooks on a live model.

    Args:
        model: A `MllamaForConditionalGeneration`, changed in place.
    """
    vision = model.config.vision_config
    keys_per_image = vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)
    tower = model.model.vision_model
    tower.register_forward_hook(_flatten)
    for encoder, wanted in ((tower.transformer, vision.intermediate_layers_indices), (tower.global_transformer, ())):
        # Numbers may count from the end.
        kept = frozenset(number % len(encoder.layers) for number in wanted)
        encoder.forward = partial(_encode, encoder, encoder.forward, kept)
    text = model.model.language_model
    text.register_forward_pre_hook(partial(_hide_padding, keys_per_image), with_kwargs=True)
    for layer in text.layers:
        if hasattr(layer, "cross_attn"):
            layer.cross_attn.register_forward_hook(_skip_rows_without_images, with_kwargs=True)


def _encode(
    encoder: nn.Module,
    stock: Callable[..., Any],
    kept: frozenset[int],
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **others: Any,
) -> Any:
    """The layers in turn, with the outputs of those that are asked for and None for others.

    Inputs are handed over by place and not by name: so they can wait in the host's memory.
    """
    if others:
        return stock(hidden_states, attention_mask=attention_mask, **others)
    from transformers.modeling_outputs import BaseModelOutput

    outputs: list[torch.Tensor | None] = []
    layers: Any = encoder.layers
    for number, layer in enumerate(layers):
        hidden_states = layer(hidden_states, attention_mask=attention_mask)
        outputs.append(hidden_states if number in kept else None)
    return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=tuple(outputs))  # type: ignore[arg-type]


def _flatten(module: nn.Module, args: Any, output: Any) -> Any:
    """Image features in three dimensions, not five: bitsandbytes' 8-bit projector takes no more on a CPU.

    The model flattens them itself, behind the projector.
    """
    output.last_hidden_state = output.last_hidden_state.flatten(0, -3)
    return output


def _hide_padding(
    keys_per_image: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    mask: torch.Tensor | None = kwargs.get("cross_attention_mask")
    if mask is None:
        return None
    import torch

    # 1 where a position belongs to an image, else 0. Shape [batch, 1, sequence, 1].
    belongs: torch.Tensor = kwargs["full_text_row_masked_out_mask"]
    # Goes down to every cross-attention with the other keyword arguments. While tokens are generated one by one, each
    # belongs to the last image of its row, so this tells rows without images apart there, too. Shape [batch, 1, 1].
    rows = belongs.amax(dim=2)
    num_images = mask.shape[-1] // keys_per_image
    if num_images > 1 and mask.shape[2] > 1:
        by_image = mask.unflatten(-1, (num_images, keys_per_image))
        # Every real image is seen from its own position at least. Shape [batch, 1, images].
        real = ((by_image == 0).any(-1) & (belongs > 0)).any(2)
        hidden = (belongs == 0) & ~real[:, :, None] & (rows[..., None] > 0)
        mask = by_image.masked_fill(hidden[..., None], torch.finfo(mask.dtype).min).flatten(-2)
    return args, {**kwargs, "cross_attention_mask": mask, _ROWS: rows}


def _skip_rows_without_images(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    if _ROWS not in kwargs:
        return None
    states, weights = output
    return states * kwargs[_ROWS], weights
