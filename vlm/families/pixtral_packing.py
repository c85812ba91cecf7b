"""Pixtral's tower over many images without a mask of all patches against all patches.

The tower puts the patches of all images into one row already. Its attention is told where each image ends; the mask that
some versions of transformers make all the same is left aside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from vlm.packing.attention import Segments


def install(model: Any, *, tower_name: str = "model.vision_tower") -> list[Any]:
    """Hooks that tell the tower's layers where images end.

    Args:
        model: A model with a Pixtral tower.
        tower_name: Full name of the tower.

    Returns:
        Handles that remove them.
    """
    tower = model.get_submodule(tower_name)
    found: list[Segments] = []

    def sizes_as_numbers(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        sizes = kwargs.get("image_sizes")
        # The model takes them one by one, and would wait for the device for each.
        return None if sizes is None else (args, {**kwargs, "image_sizes": sizes.tolist()})

    def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from vlm.packing.attention import Segments

        found.clear()
        sizes = kwargs.get("image_sizes")
        if sizes is None:
            return
        side = tower.patch_size
        lengths = [(height // side) * (width // side) for height, width in sizes]
        found.append(Segments.of_lengths(lengths, model.device))

    def tell(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not found:
            return None
        return args, {**kwargs, "attention_mask": None, "segments": found.pop()}

    return [
        model.model.register_forward_pre_hook(sizes_as_numbers, with_kwargs=True),
        tower.register_forward_pre_hook(measure, with_kwargs=True),
        tower.transformer.register_forward_pre_hook(tell, with_kwargs=True),
    ]
