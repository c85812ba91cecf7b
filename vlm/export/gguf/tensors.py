"""Which tensors of GGUF files a model's parameters become. Loads torch.

Where llama.cpp's architecture rotates neighbouring numbers of a query or key (``x0 x1``, ``x2 x3``, ...), and
transformers the first half with the second (``x0 xn``, ``x1 xn+1``, ...), rows are reordered within each head:

    transformers   0 1 2 ... n-1 | n n+1 ... 2n-1
    llama.cpp      0 n 1 n+1 2 n+2 ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlm.errors import ExportError
from vlm.families.gguf import GgufLayout

File = Literal["language", "vision"]

_LAYER = r"model\.language_model\.layers\.(\d+)\."
_ENDING = r"\.(weight|bias)"
LANGUAGE_NAMES: tuple[tuple[str, str], ...] = (
    (r"model\.language_model\.embed_tokens\.weight", "token_embd.weight"),
    (r"model\.language_model\.norm\.weight", "output_norm.weight"),
    (r"lm_head\.weight", "output.weight"),
    (_LAYER + r"input_layernorm\.weight", r"blk.\1.attn_norm.weight"),
    (_LAYER + r"post_attention_layernorm\.weight", r"blk.\1.ffn_norm.weight"),
    (_LAYER + r"self_attn\.([qkv])_proj" + _ENDING, r"blk.\1.attn_\2.\3"),
    (_LAYER + r"self_attn\.o_proj" + _ENDING, r"blk.\1.attn_output.\2"),
    (_LAYER + r"mlp\.(gate|up|down)_proj" + _ENDING, r"blk.\1.ffn_\2.\3"),
)


@dataclass(frozen=True)
class Destination:
    """A tensor of a GGUF file and where it comes from."""

    file: File
    """Which of the two files."""
    name: str
    """Its name there."""
    source: str
    """Full name of the parameter."""
    convert: Callable[[torch.Tensor], torch.Tensor]
    """The parameter to the tensor."""
    shape: tuple[int, ...]
    """Of the tensor, slowest dimension first."""


def destinations(
    layout: GgufLayout, shapes: Mapping[str, torch.Size], config: Mapping[str, Any], row_break_id: int | None
) -> dict[str, list[Destination]]:
    """All tensors of both files.

    Args:
        layout: Of the family.
        shapes: Shapes of all parameters, by full name.
        config: Content of `config.json` with all defaults.
        row_break_id: Id of the layout's `row_break_token`.

    Returns:
        Tensors by the parameter that they come from.

    Raises:
        ExportError: A parameter has no place in llama.cpp's architecture.
    """
    text = config["text_config"]
    heads = {"q": text["num_attention_heads"], "k": text["num_key_value_heads"]}
    vision_heads = int(layout.vision_metadata(config)["clip.vision.attention.head_count"])  # type: ignore[arg-type]
    found = {}
    for name, shape in shapes.items():
        targets = []
        for pattern, replacement in LANGUAGE_NAMES:
            if match := re.fullmatch(pattern, name):
                target = match.expand(replacement)
                which = re.fullmatch(r"blk\.\d+\.attn_([qk])\.\w+", target)
                convert = _interleave(heads[which[1]]) if which and layout.interleaved_language else _as_is
                targets.append(("language", target, convert))
        for pattern, replacements in layout.vision_names:
            if match := re.fullmatch(pattern, name):
                for number, replacement in enumerate(replacements):
                    target = match.expand(replacement)
                    convert = _part(number, len(replacements)) if len(replacements) > 1 else _as_is
                    if layout.interleaved_vision and re.fullmatch(r"v\.blk\.\d+\.attn_[qk]\.\w+", target):
                        convert = _interleave(vision_heads)
                    targets.append(("vision", target, convert))
        if row_break_id is not None and name.endswith("embed_tokens.weight"):
            targets.append(("vision", "v.token_embd.img_break", _row(row_break_id)))
        if not targets:
            raise ExportError(
                f"the parameter {name!r} has no place in llama.cpp's architecture {layout.architecture!r}; take 'gguf' out of"
                " export.types and report this with the model's name"
            )
        bare = torch.empty(shape, device="meta")
        found[name] = [
            Destination(file, target, name, convert, tuple(convert(bare).shape))  # type: ignore[arg-type]
            for file, target, convert in targets
        ]
    return found


def in_order(names: Iterable[str], found: Mapping[str, list[Destination]], file: File) -> list[Destination]:
    """One file's tensors in the order in which their sources come.

    Args:
        names: Parameters, in order.
        found: What `destinations` gave.
        file: Which file.
    """
    return [destination for name in names for destination in found[name] if destination.file == file]


def _as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _part(number: int, count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 5:  # [outputs, channels, time, height, width]
            return tensor[:, :, number]
        return tensor.chunk(count, dim=0)[number]

    return convert


def _row(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor[number]


def _interleave(num_heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def convert(tensor: torch.Tensor) -> torch.Tensor:
        halves = tensor.unflatten(0, (num_heads, 2, -1))
        return halves.transpose(1, 2).flatten(0, 2)

    return convert
