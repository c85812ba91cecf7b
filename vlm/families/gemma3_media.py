r"""Image handling of Gemma 3: every image becomes one square of a fixed size and the same number of tokens.

What stands for an image in the text has line breaks of its own:

    \n\n<start_of_image> <image_soft_token> x 256 <end_of_image>\n\n

Further crops of elongated images ("pan and scan") are off, as the stock processor has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlm.families.family import ImageLayout, MediaParts, RowImages, Run
from vlm.families.pixels import PixelBytes, stacked

if TYPE_CHECKING:
    import torch

PLACEHOLDER = "<start_of_image>"
IMAGE_TOKEN = "<image_soft_token>"
END_TOKEN = "<end_of_image>"
MEDIA_TOKENS = (IMAGE_TOKEN, PLACEHOLDER, END_TOKEN)
# Tokens of an image, where no file says.
_TOKENS_PER_IMAGE = 256


def target_size(
    parts: MediaParts, height: int, width: int, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """The one size that the model takes, whatever the image's shape. Limits on the area change nothing.

    Args:
        parts: Processor pieces.
        height: Height in pixels.
        width: Width in pixels.
        min_pixels: Has no say.
        max_pixels: Has no say.

    Returns:
        Height and width in pixels.
    """
    size = parts.image_processor.size
    return int(size["height"]), int(size["width"])


def image_layout(parts: MediaParts, height: int, width: int) -> ImageLayout:
    """A run of tokens between a start and an end, with empty lines around."""
    count = int(parts.settings.get("image_seq_length", _TOKENS_PER_IMAGE))
    return (f"\n\n{PLACEHOLDER}", Run(IMAGE_TOKEN, count), f"{END_TOKEN}\n\n")


def pixel_inputs(parts: MediaParts, images: RowImages) -> dict[str, Any]:
    """All images of the batch, one after the other.

    Args:
        parts: Processor pieces.
        images: uint8 arrays of shape [side, side, 3] at their target size.

    Returns:
        ``pixel_values`` of shape [images, 3, side, side], still as bytes; nothing for a batch without images.
    """
    flat = [image for row in images for image in row]
    size = target_size(parts, 0, 0, None, None)
    assert all(image.shape[:2] == size for image in flat), "images come at their target size"
    return {"pixel_values": PixelBytes.of(flat, parts.image_processor, stacked)} if flat else {}


def token_inputs(parts: MediaParts, input_ids: torch.Tensor, media: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Marks image tokens (1): those of one image see each other in both directions.

    Given without images, too: some versions of the model refuse to train where it is left out.

    Returns:
        ``token_type_ids`` of shape [batch, sequence].
    """
    return {"token_type_ids": (input_ids == parts.token_id(IMAGE_TOKEN)).long()}


def patches_per_token(config: Mapping[str, Any]) -> int:
    """Positions in the vision tower behind a media token, by a model's `config.json`: squares of them are averaged."""
    vision = config["vision_config"]
    patches = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2
    return patches // int(config.get("mm_tokens_per_image", _TOKENS_PER_IMAGE))
