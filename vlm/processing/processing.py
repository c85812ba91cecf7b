"""A model's processor, built from its parts so that images need no torchvision.

transformers is imported when a folder is opened, torch when tensors are made.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.config.data import BoxConvention
from vlm.errors import DataError, ModelError
from vlm.families import FAMILIES, Family, ImageLayout, MediaParts, PackedSamples, Run, Video
from vlm.families.classes import transformers_class
from vlm.families.pixels import finished
from vlm.processing import files
from vlm.processing.encoding import ChatEncoder, Encoded
from vlm.processing.template import read_template

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image


class Processing:
    """Everything between messages with images and a model's inputs. Safe to use from several threads.

    Build it with `Processing.from_dir`.

    Attributes:
        family: Row of the family table.
        tokenizer: The transformers tokenizer.
        image_processor: The transformers image processor, PIL backend.
        chat_template: Jinja source of the chat template; one that writes the date writes always the same one.
        context_length_tokens: Longest sequence that the model was made for; None where its config does not say.
        stop_token_ids: Ids that end a generated answer.
        media_token_ids: Ids of image, video and surrounding tokens; they carry no loss.
        image_token_id: Id whose embedding is replaced by image features.
        pad_token_id: Id for padding.
    """

    def __init__(
        self,
        *,
        family: Family,
        tokenizer: Any,
        image_processor: Any,
        chat_template: str,
        settings: Mapping[str, Any],
        source_dir: Path,
        context_length_tokens: int | None,
        stop_token_ids: tuple[int, ...],
    ) -> None:
        self.family = family
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.chat_template = chat_template
        self.context_length_tokens = context_length_tokens
        self.stop_token_ids = stop_token_ids or _end_token(tokenizer, source_dir)
        self._source_dir = source_dir
        self._parts = MediaParts(image_processor, settings, tokenizer.convert_tokens_to_ids)
        self._encoder = ChatEncoder(tokenizer, chat_template, family)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(family.image_token)
        known = tokenizer.get_vocab()
        self.media_token_ids = frozenset(known[token] for token in family.media_tokens if token in known)
        if family.image_token not in known:
            raise ModelError(
                f"the tokenizer in {source_dir} has no {family.image_token!r}, which {family.title} needs for images;"
                " use the tokenizer that belongs to the model"
            )
        self.pad_token_id: int = self.stop_token_ids[-1] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @classmethod
    def from_dir(cls, processor_dir: Path) -> Processing:
        """Opens a processor folder (ours, or a whole checkpoint folder as on the Hub).

        Args:
            processor_dir: Folder with tokenizer, `preprocessor_config.json` or `processor_config.json`, and a chat template.

        Raises:
            ModelError: The folder lacks one of them, or the tokenizer has no `tokenizers` backend.
        """
        import transformers

        processor_dir = Path(processor_dir)
        family, context_length, stop_token_ids = files.describe(processor_dir)
        if family.image_processor_defaults is None and not any(
            (processor_dir / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
        ):
            raise ModelError(
                f"{processor_dir} has neither preprocessor_config.json nor processor_config.json, so images cannot be"
                " prepared as the model expects; copy them from the original model"
            )
        try:
            tokenizer_class: Any = getattr(transformers, family.tokenizer_class or "AutoTokenizer")
            # Said, and not left out: transformers would ask on the terminal whether to run code that the folder brings.
            tokenizer = tokenizer_class.from_pretrained(processor_dir, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # `tokenizers` raises nothing more special for a damaged file
            raise ModelError(
                f"the tokenizer in {processor_dir} cannot be opened ({error}); fetch the model again"
            ) from error
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer in {processor_dir} has no tokenizer.json, which is needed to find the assistant's words;"
                " convert it with transformers' save_pretrained"
            )
        return cls(
            family=family,
            tokenizer=tokenizer,
            image_processor=_image_processor(processor_dir, family),
            chat_template=read_template(processor_dir, tokenizer, family),
            settings=_settings(processor_dir),
            source_dir=processor_dir,
            context_length_tokens=context_length,
            stop_token_ids=stop_token_ids,
        )

    @property
    def box_convention(self) -> BoxConvention:
        """How the family's models give coordinates in answers."""
        return self.family.box_convention

    @property
    def video_problem(self) -> str | None:
        """Why the model takes no videos, and which families do; None if it takes them."""
        if self.family.video is not None:
            return None
        able = " or ".join(family.title for family in FAMILIES.values() if family.video is not None)
        return f"{self.family.title} takes no videos; use a model of {able}"

    def target_size(
        self, height: int, width: int, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> tuple[int, int]:
        """The size that the model's own processor would resize an image to.

        Args:
            height: Height in pixels.
            width: Width in pixels.
            min_pixels: Area limit in place of the processor's; None keeps that.
            max_pixels: Area limit in place of the processor's; None keeps that.

        Returns:
            Height and width in pixels.

        Raises:
            DataError: The processor refuses such an image (too elongated).
        """
        return self.family.target_size(self._parts, height, width, min_pixels, max_pixels)

    def resize_image(self, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """Resizes as the model's own processor does, with its resampling filter.

        Args:
            image: Any mode; converted to RGB, transparency on white.
            size: Height and width in pixels, from `target_size`.

        Returns:
            Read-only uint8 array of shape [height, width, 3]. Grey images have one channel in memory, seen three times.
        """
        import numpy as np

        height, width = size
        # Filters work on each channel alone, so one stands for three equal ones.
        is_grey = image.mode == "L" and not image.has_transparency_data
        if not is_grey:
            image = _on_white(image) if image.has_transparency_data else image.convert("RGB")
        if self.family.resize is not None:
            image = self.family.resize(self._parts, image, size)
        elif image.size != (width, height):
            image = image.resize((width, height), resample=self.image_processor.resample)
        if is_grey:
            return np.ndarray((height, width, 3), np.uint8, image.tobytes(), strides=(width, 1, 0))
        return np.ndarray((height, width, 3), np.uint8, image.tobytes())

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        image_sizes: Sequence[tuple[int, ...]],
        add_generation_prompt: bool = False,
    ) -> Encoded:
        """Tokenises a conversation exactly as the model's own processor does.

        The strings of control tokens inside people's text stay text: they never become control tokens.

        Args:
            messages: OpenAI-style messages; image parts are ``{"type": "image"}``, video parts ``{"type": "video"}``.
            image_sizes: In the order of these parts, at target size: height and width of an image; frames, height and width
                of a video.
            add_generation_prompt: End with the start of an assistant turn, for generation.

        Raises:
            DataError: The chat template refuses the conversation or does not render it from front to back, or the number
                of images differs from the number of image parts.
        """
        return self._encoder.encode(messages, [self._layout(size) for size in image_sizes], add_generation_prompt)

    def _layout(self, size: tuple[int, ...]) -> ImageLayout:
        if len(size) == 2:
            return self.family.image_layout(self._parts, *size)
        if self.family.video is None:
            raise DataError(f"{self.video_problem}, or give the frames as images")
        return self.family.video.layout(self._parts, *size)

    def encode_text(self, text: str, image_sizes: Sequence[tuple[int, ...]]) -> Encoded:
        """Tokenises text that `render` has made; it has no assistant spans.

        Args:
            text: With one placeholder per image or video.
            image_sizes: As in `encode`, in the order of the placeholders.

        Raises:
            DataError: The text has places for another number of images.
        """
        return self._encoder.encode_text(text, [self._layout(size) for size in image_sizes])

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """The conversation as the chat template writes it, with one placeholder per image.

        Raises:
            DataError: The chat template refuses the conversation.
        """
        return self._encoder.render(messages, add_generation_prompt)

    def num_image_tokens(self, height: int, width: int) -> int:
        """Number of media tokens that an image of this target size takes in the sequence."""
        layout = self.family.image_layout(self._parts, height, width)
        return sum(piece.count for piece in layout if isinstance(piece, Run))

    def pixel_inputs(
        self, images: Sequence[np.ndarray | Video] | Sequence[Sequence[np.ndarray | Video]]
    ) -> dict[str, Any]:
        """The model's image and video tensors.

        Args:
            images: As for `pixel_bytes`.

        Returns:
            Tensors by the model's argument names, float32, and plain lists where it takes those; empty for no images.
        """
        return finished(self.pixel_bytes(images))

    def pixel_bytes(
        self, images: Sequence[np.ndarray | Video] | Sequence[Sequence[np.ndarray | Video]]
    ) -> dict[str, Any]:
        """The model's image and video tensors, with pixels still as bytes: small, and made without arithmetic.

        Args:
            images: uint8 arrays of shape [height, width, 3] at their target size, and videos, as one list or as one list per
                row of the batch. Families that pad images per row need the latter.

        Returns:
            `PixelBytes` in place of pixel tensors, sizes as tensors, and plain lists where the model takes those;
            `finished` makes the pixel tensors on whatever device the bytes are then. Empty for no images.
        """
        rows: Any = images if images and isinstance(images[0], Sequence) else [images]
        videos = [[medium for medium in row if isinstance(medium, Video)] for row in rows]
        if not any(videos):
            return self.family.pixel_inputs(self._parts, rows)
        assert self.family.video is not None, "no video without its layout"
        stills = [[medium for medium in row if not isinstance(medium, Video)] for row in rows]
        return {**self.family.pixel_inputs(self._parts, stills), **self.family.video.inputs(self._parts, videos)}

    def model_inputs(self, input_ids: torch.Tensor, pixel_inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All that the model takes beside ids, attention mask and labels.

        Args:
            input_ids: Tensor of shape [batch, sequence], padded.
            pixel_inputs: What `pixel_inputs` or `pixel_bytes` gave for the batch.

        Returns:
            The pixel inputs, and what the family derives from the ids, such as ``mm_token_type_ids``.
        """
        media = dict(pixel_inputs or {})
        return {**media, **self.family.token_inputs(self._parts, input_ids, media)}

    def packed_inputs(
        self,
        samples: Sequence[torch.Tensor],
        images: Sequence[Sequence[Any]],
        config: Mapping[str, Any],
        *,
        media: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """All that the model takes beside ids and labels for several conversations in one row.

        Args:
            samples: Ids of each conversation, of shape [tokens].
            images: For each conversation, its images and videos as for `pixel_inputs`.
            config: The model's `config.json`.
            media: The pixel inputs of all images, where they are made elsewhere: what describes their sizes is enough. None
                makes them.

        Returns:
            ``position_ids``, the pixel inputs, still as bytes, and ``packed_row``: where the samples end, as a list and as a
            tensor, and what the family's packing needs beside.
        """
        import torch

        packing = self.family.packing
        assert packing is not None, f"{self.family.model_type} cannot be packed"
        lengths = [len(ids) for ids in samples]
        packed = PackedSamples(
            parts=self._parts,
            samples=samples,
            num_media=[len(own) for own in images],
            media=self.pixel_bytes([[image for own in images for image in own]]) if media is None else media,
            config=config,
        )
        row: dict[str, Any] = {"lengths": lengths, "ends": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)}
        if packing.positions is not None:
            positions = packing.positions(packed)
        else:
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
        if packing.tower_inputs is not None:
            row["tower"] = packing.tower_inputs(packed)
        if packing.row_inputs is not None:
            row |= packing.row_inputs(packed)
        return {"position_ids": positions, **packed.media, "packed_row": row}

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids, without control tokens (but for the family's markup) and without changes to white space."""
        if self.family.markup_tokens:
            dropped = {
                id_
                for id_, token in self.tokenizer.added_tokens_decoder.items()
                if token.special and token.content not in self.family.markup_tokens
            }
            token_ids = [id_ for id_ in token_ids if id_ not in dropped]
            return str(self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def save(self, directory: Path) -> None:
        """Writes a folder that `from_dir` and transformers' AutoProcessor open (the latter needs torchvision).

        The model's own files are copied, not written anew, so that nothing of them gets lost.
        """
        files.copy_processor_files(self._source_dir, directory)
        if not any((directory / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
            (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        if self.family.image_processor_defaults is not None and not files.has_image_processor(directory):
            text = json.dumps(self.family.image_processor_defaults, indent=2, sort_keys=True)
            (directory / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")
        files.write_own_file(directory, self.family, self.context_length_tokens, self.stop_token_ids)


def _on_white(image: Image.Image) -> Image.Image:
    """Text on a transparent page is dark; a plain conversion would put it on black."""
    import PIL.Image

    page = PIL.Image.new("RGBA", image.size, "white")
    page.alpha_composite(image.convert("RGBA"))
    return page.convert("RGB")


def _image_processor(folder: Path, family: Family) -> Any:
    """By class and not through AutoImageProcessor, which wants torchvision in some versions.

    From the class's own module: some versions put a stand-in at their top level that wants torchvision for nothing.
    """
    named = transformers_class(family, family.image_processor_class)
    image_processor_class: Any = getattr(importlib.import_module(named.__module__), family.image_processor_class)
    if family.image_processor_defaults is not None and not files.has_image_processor(folder):
        return image_processor_class.from_dict(dict(family.image_processor_defaults))
    try:
        return image_processor_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"the image processor's settings in {folder} cannot be used ({error}); fetch the model again"
        ) from error


def _end_token(tokenizer: Any, folder: Path) -> tuple[int, ...]:
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"neither the tokenizer nor the configs in {folder} name a token that ends an answer; add eos_token_id to its"
            " generation_config.json"
        )
    return (tokenizer.eos_token_id,)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "processor_config.json"
    if not path.is_file():
        return {}
    return {name: value for name, value in files.read_json(path).items() if not isinstance(value, dict)}
