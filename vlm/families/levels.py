"""What an image processor makes of bytes, as a look-up table: normalising a page then costs a fraction of the time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def byte_levels(processor: Any) -> np.ndarray:
    """What the processor makes of each byte in each channel.

    Args:
        processor: A transformers image processor.

    Returns:
        float32 array of shape [3, 256].
    """
    import numpy as np

    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    if processor.do_rescale:
        levels = processor.rescale(levels, processor.rescale_factor)
    if processor.do_normalize:
        levels = processor.normalize(levels, processor.image_mean, processor.image_std)
    return np.asarray(levels, np.float32).reshape(3, 256)
