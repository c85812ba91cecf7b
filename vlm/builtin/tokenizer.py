"""A byte-level BPE tokenizer of about a thousand tokens, trained here on text made by a seeded generator.

Its special tokens and its way of cutting text are those of the Qwen models, so that the built-in model is an ordinary
member of their family. transformers is imported when it is built.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

VOCAB_SIZE = 1024
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CORPUS_SEED = 2026
_CORPUS_LINES = 4000

_VOCABULARY = (
    "total subtotal tax discount change cash card visa paid balance due date time table guest server order receipt "
    "invoice number amount price quantity item unit net gross thank you please come again welcome open daily street "
    "avenue road market store shop cafe bakery pharmacy hotel garage library phone fax mail web page customer copy "
    "merchant terminal approved code auth reference transcribe the text in this image what is written read line word "
    "document picture coffee tea milk bread butter cheese apple banana orange tomato potato onion carrot rice pasta "
    "pizza burger salad soup water juice wine beer sugar salt pepper chicken beef fish egg cake cookie ice cream "
    "small medium large extra hot cold monday tuesday wednesday thursday friday saturday sunday january february "
    "march april may june july august september october november december and or of to for with from by at on as it "
    "that are was has have not all one two three four five six seven eight nine ten first second last new old name "
    "city state country zip form page section figure system user assistant answer question show describe list how "
    "many which color where who when why helpful"
)
_ENDINGS = ("", "", "", "s", "ing", "ed", "er", "ly")
_SENTENCES = ("Transcribe the text in the image.", "You are a helpful assistant.", "What is the total?")
_MARKS = (" ", " ", " ", ", ", ". ", ": ", " - ", "\n", " / ", " x ", " # ", "! ", "? ")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def corpus() -> list[str]:
    """Lines of receipt-like text; the same on every machine."""
    choose = random.Random(CORPUS_SEED)
    words = _VOCABULARY.split()
    lines = []
    for _ in range(_CORPUS_LINES):
        pieces = []
        for _ in range(choose.randint(3, 9)):
            word = choose.choice(words) + choose.choice(_ENDINGS)
            style = choose.random()
            if style < 0.2:
                word = word.capitalize()
            elif style < 0.35:
                word = word.upper()
            elif style < 0.5:
                word = f"{choose.randint(0, 199)}.{choose.randint(0, 99):02d}"
            elif style < 0.6:
                word = str(choose.randint(0, 99999))
            pieces += [word, choose.choice(_MARKS)]
        lines.append("".join(pieces).strip())
    return lines + list(_SENTENCES) * 200


Trained = tuple[dict[str, int], list[tuple[str, str]]]


@lru_cache(maxsize=1)
def _trained() -> Trained:
    return train_merges(corpus(), VOCAB_SIZE - len(SPECIAL_TOKENS))


def train_merges(lines: Iterable[str], vocab_size: int) -> Trained:
    """Learns which bytes are merged, on text cut as the Qwen models cut it.

    Args:
        lines: The text.
        vocab_size: Most tokens, the 256 bytes among them.

    Returns:
        Ids of the tokens, and the merges in order.
    """
    import json

    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer=trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def build_tokenizer(trained: Trained | None = None) -> Any:
    """The tokenizer, with the chat template; the last eight ids are the special tokens.

    Args:
        trained: Tokens and merges; None for those of the receipt-like text.

    Returns:
        A transformers `Qwen2Tokenizer`.
    """
    from transformers import AddedToken, Qwen2Tokenizer

    vocab, merges = _trained() if trained is None else trained
    settings: dict[str, Any] = {
        "vocab": dict(vocab),
        "merges": list(merges),
        "unk_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
    }
    tokenizer = Qwen2Tokenizer(**settings)
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS], special_tokens=True
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
