"""A tiny random Pixtral checkpoint."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.support import tiny_mistral
from tests.support.tiny_family import TinyFamily


def build(tie: bool) -> Any:
    """A model over the tokens of `tiny_mistral`."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=tiny_mistral.text_config(tie),
            vision_config=tiny_mistral.vision_config(),
            image_token_index=tiny_mistral.tokenizer().convert_tokens_to_ids("[IMG]"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_seq_length=1,
            tie_word_embeddings=tie,
        )
    )


PIXTRAL = TinyFamily(
    build=build,
    write=partial(tiny_mistral.write, spatial_merge_size=1),
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
    projector=("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
)
