"""A tiny random Mistral 3 checkpoint, whose projector merges 2 x 2 patches into one token."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.support import tiny_mistral
from tests.support.tiny_family import TinyFamily


def build(tie: bool) -> Any:
    """A model over the tokens of `tiny_mistral`."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=tiny_mistral.text_config(tie),
            vision_config=tiny_mistral.vision_config(),
            image_token_index=tiny_mistral.tokenizer().convert_tokens_to_ids("[IMG]"),
            spatial_merge_size=2,
            tie_word_embeddings=tie,
        )
    )


MISTRAL3 = TinyFamily(
    build=build,
    write=partial(tiny_mistral.write, spatial_merge_size=2),
    processor_class="PixtralProcessor",
    stock_processor=tiny_mistral.stock_processor,
    answer_start="[/INST]",
    end_of_turn="</s>",
    pad_token="<pad>",
    image_tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    language_attention=tiny_mistral.LANGUAGE_ATTENTION,
    language_mlp=tiny_mistral.LANGUAGE_MLP,
    vision_attention=tiny_mistral.VISION_ATTENTION,
    vision_mlp=tiny_mistral.VISION_MLP,
    projector=(
        "model.multi_modal_projector.patch_merger.merging_layer",
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    ),
)
