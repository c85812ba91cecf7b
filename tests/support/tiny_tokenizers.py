"""Tokenizers with the control tokens of other families over the built-in tokenizer's vocabulary."""

from __future__ import annotations

import json
from typing import Any

from vlm.builtin.tokenizer import SPECIAL_TOKENS as BUILTIN_SPECIAL_TOKENS
from vlm.builtin.tokenizer import VOCAB_SIZE, build_tokenizer

NUM_ORDINARY = VOCAB_SIZE - len(BUILTIN_SPECIAL_TOKENS)
MAX_LENGTH_TOKENS = 4096


def tokenizer_with(special_tokens: tuple[str, ...], *, bos: str | None, eos: str, pad: str, chat_template: str) -> Any:
    """A byte-level tokenizer that puts `bos` before a text, as those of Llama and Mistral do, if there is one.

    Args:
        special_tokens: Their ids follow those of the ordinary tokens, in this order.
        bos: Token before a text; None for none.
        eos: Token behind one.
        pad: Token for padding.
        chat_template: Jinja source.
    """
    import tokenizers
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    description = json.loads(build_tokenizer().backend_tokenizer.to_str())
    description["added_tokens"] = []
    backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in special_tokens]
    )
    backend.post_processor = ByteLevel(trim_offsets=False)
    if bos is not None:
        first = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
        backend.post_processor = Sequence([backend.post_processor, first])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=MAX_LENGTH_TOKENS
    )
    tokenizer.chat_template = chat_template
    return tokenizer
