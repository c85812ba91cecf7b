"""What the tests know of a family apart from its row: how to build a tiny checkpoint, and what must come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.config import LoraConfig
from vlm.lora.targets import EXPERTS_PATTERN


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """One family's facts, written down from printed models and published formats, not computed with the family's row.

    Attributes:
        build: Builds a model without weights of note; takes whether the head shares the embeddings' weights.
        write: Writes a model's checkpoint folder: `(model, folder)`.
        processor_class: Name of the stock processor's class.
        stock_processor: Opens a folder with the stock processor, or the parts of it that need no torchvision.
        answer_start: What the chat template writes right before an answer.
        end_of_turn: The token behind an answer.
        pad_token: The token for padding.
        image_tokens: All tokens that stand for images.
        language_attention: Full names of these projections, and so on.
        language_layers: Full names of the decoder layers, first to last.
        vision_layers: Full names of the vision encoders' layers, first to last.
        language_experts: Full names of the 3-D parameters of routed experts.
        idle_parameters: Full names of parameters that the tests' small images do not reach.
        marks_answers: Whether `answer_start` can only stand before an answer; else it is what the tests' own question
            ends with, and nothing stands between the two.
        answer_lead: What the chat template writes between a generation prompt and an answer, so that models generate it.
        images_by_row: Whether the stock processor takes a batch's images as one list per row.
        implied_inputs: Tensors of the stock processor that the model computes itself where they are left out.
    """

    build: Callable[[bool], Any]
    write: Callable[[Any, Path], None]
    processor_class: str
    stock_processor: Callable[[Path], Any]
    answer_start: str
    end_of_turn: str
    pad_token: str
    image_tokens: tuple[str, ...]
    language_attention: tuple[str, ...]
    language_mlp: tuple[str, ...]
    vision_attention: tuple[str, ...]
    vision_mlp: tuple[str, ...]
    projector: tuple[str, ...]
    language_layers: tuple[str, ...]
    vision_layers: tuple[str, ...]
    language_experts: tuple[str, ...] = ()
    idle_parameters: tuple[str, ...] = ()
    marks_answers: bool = True
    answer_lead: str = ""
    images_by_row: bool = False
    implied_inputs: tuple[str, ...] = ()

    @property
    def num_linear_layers(self) -> int:
        """Linear layers outside the head."""
        groups = (self.language_attention, self.language_mlp, self.vision_attention, self.vision_mlp, self.projector)
        return sum(len(group) for group in groups)

    def without_experts(self, lora: LoraConfig) -> LoraConfig:
        """The same settings without routed experts, which have no DoRA and no dropout."""
        if not self.language_experts:
            return lora
        return lora.model_copy(update={"exclude_modules": (*lora.exclude_modules, EXPERTS_PATTERN)})


def stock_pixels(facts: TinyFamily, oracle: Any, rows: list[list[Any]], **options: Any) -> dict[str, Any]:
    """Image tensors of a stock processor for a batch.

    Args:
        facts: Of its family.
        oracle: The stock processor.
        rows: Images of each row.
        options: For its image processor.
    """
    if facts.images_by_row:
        output = oracle.image_processor(rows, return_tensors="pt", **options)
    else:
        output, _ = oracle._process_images([image for row in rows for image in row], return_tensors="pt", **options)
    return {name: value for name, value in output.items() if name not in ("num_tiles", *facts.implied_inputs)}


def names(pattern: str, numbers: int, endings: tuple[str, ...]) -> tuple[str, ...]:
    """Full names of layers that are numbered from 0."""
    return tuple(pattern.format(number) + ending for number in range(numbers) for ending in endings)
