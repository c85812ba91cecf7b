"""Pixels on their way to the model: bytes as long as they travel, numbers only where they are used.

    host                                       device
    images, uint8 --one copy--> PixelBytes --to--> PixelBytes --values--> patches or tiles in the model's precision

The host does no arithmetic, and what it sends is an eighth of what Qwen2-VL takes in float32. What an image processor
makes of a byte is looked up in a table of 256 numbers per channel, which the processor itself has filled; so the values
are its own to the last bit on any device. In 16 bit they are those numbers rounded once, to the nearest: what a vision
tower would make of the float32 ones before its first layer.

Imports torch when a function runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm.families.levels import byte_levels

if TYPE_CHECKING:
    import numpy as np
    import torch

_CACHED_VALUES = 1 << 16


@dataclass(frozen=True, eq=False)
class Numbers:
    """Turns bytes into the model's numbers.

    Attributes:
        table: Shape [768]: what 0 to 255 become in the first channel, then in the second and the third.
    """

    table: torch.Tensor

    def __call__(self, pixels: torch.Tensor, dim: int) -> torch.Tensor:
        """Looks bytes up.

        Args:
            pixels: uint8 tensor with three channels.
            dim: The dimension of the channels.

        Returns:
            Tensor of the same shape in the table's precision.
        """
        import torch

        first = torch.arange(0, 768, 256, dtype=torch.int32, device=pixels.device)
        first = first.view(3, *(1,) * (pixels.ndim - dim - 1))
        made = self.table.new_empty(pixels.shape)
        size = len(pixels)
        if pixels.device.type == "cpu" and dim > 0:
            # In pieces that stay in a core's cache: nearly twice as fast. A GPU would rather have one large piece.
            size = max(1, _CACHED_VALUES * size // max(pixels.numel(), 1))
        for piece, place in zip(pixels.split(size), made.split(size), strict=True):
            torch.index_select(self.table, 0, (piece.int() + first).flatten(), out=place.view(-1))
        return made

    def zeros(self, *shape: int) -> torch.Tensor:
        """Padding in the table's precision and on its device."""
        return self.table.new_zeros(shape)


# `(images, numbers)` to the model's tensor; images are uint8 tensors of shape [..., height, width, 3].
Arrange = Callable[[Sequence["torch.Tensor"], Numbers], "torch.Tensor"]


@dataclass(frozen=True, eq=False)
class PixelBytes:
    """A pixel tensor of a model before it is one: bytes of images and how to arrange them.

    Data loaders pin it and accelerate moves it like a tensor.

    Attributes:
        data: uint8 tensor of shape [bytes of all images].
        shapes: Of each image in `data`: height, width and channels, with frames first for videos. A single channel stands for
            three equal ones.
        levels: float32 tensor of shape [3, 256]: what the image processor makes of a byte in each channel.
        arrange: Makes the model's tensor. Must be picklable.
    """

    data: torch.Tensor
    shapes: tuple[tuple[int, ...], ...]
    levels: torch.Tensor
    arrange: Arrange

    @classmethod
    def of(cls, images: Sequence[np.ndarray], processor: Any, arrange: Arrange) -> PixelBytes:
        """Copies images behind each other, grey ones with one channel.

        Args:
            images: uint8 arrays of shape [..., height, width, 3]; a grey one has one channel in memory, seen three times.
            processor: A transformers image processor, which says what bytes become.
            arrange: Makes the model's tensor.
        """
        import numpy as np
        import torch

        stored = [image[..., :1] if image.strides[-1] == 0 else image for image in images]
        data = torch.empty(sum(image.size for image in stored), dtype=torch.uint8)
        place, start = data.numpy(), 0
        for image in stored:
            np.copyto(place[start : start + image.size].reshape(image.shape), image)
            start += image.size
        levels = torch.from_numpy(byte_levels(processor))
        return cls(data, tuple(image.shape for image in stored), levels, arrange)

    def pin_memory(self) -> PixelBytes:
        """The same in pinned memory, from which copies to a GPU need no waiting."""
        return dataclasses.replace(self, data=self.data.pin_memory(), levels=self.levels.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PixelBytes:
        """The same on a device.

        Args:
            device: Where to.
            non_blocking: Do not wait for the copy; for pinned memory.
        """
        data, levels = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.data, self.levels))
        return dataclasses.replace(self, data=data, levels=levels)

    def values(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The model's tensor, made on the device of the bytes.

        Args:
            dtype: Its precision: float32 values are rounded to it once, to the nearest. None for float32.
        """
        import math

        sizes = [math.prod(shape) for shape in self.shapes]
        images = [
            image.view(shape).expand(*shape[:-1], 3)
            for image, shape in zip(self.data.split(sizes), self.shapes, strict=True)
        ]
        return self.arrange(images, Numbers(self.levels.flatten().to(dtype or self.levels.dtype)))


def finished(inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Model inputs with tensors in place of bytes, each made where its bytes are.

    Args:
        inputs: By the model's argument names.
        dtype: Precision of what is made; None for float32.
    """
    return {name: value.values(dtype) if isinstance(value, PixelBytes) else value for name, value in inputs.items()}


def stacked(images: Sequence[torch.Tensor], numbers: Numbers) -> torch.Tensor:
    """Images of one size as they are.

    Args:
        images: uint8 tensors of shape [height, width, 3].
        numbers: Looks bytes up.

    Returns:
        Shape [images, 3, height, width].
    """
    import torch

    return numbers(torch.stack(list(images)).permute(0, 3, 1, 2), 1)
