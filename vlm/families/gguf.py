"""How llama.cpp names a family's parts in GGUF files. Plain data and functions of a `config.json`'s content.

llama.cpp runs a vision-language model from two files: the language model under an architecture of its own, and an
"mmproj" file (architecture ``clip``) with the vision tower and the projector, told apart by ``clip.projector_type``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlm.errors import ExportError

Value = bool | int | float | str | list[float]


@dataclass(frozen=True, kw_only=True)
class GgufLayout:
    """What llama.cpp needs to know of one family.

    Attributes:
        architecture: llama.cpp's name of the language model's architecture.
        pre_tokenizer: llama.cpp's name of the rule that cuts text into words before byte pairs are merged, for tokenizers
            whose pattern says nothing else.
        projector: Value of ``clip.projector_type``.
        interleaved_language: Whether that architecture rotates neighbouring numbers of a query or key where transformers
            rotates one of the first half with one of the second; rows of the projections are reordered then.
        interleaved_vision: The same of the vision tower.
        vision_names: Patterns of parameters' full names, and the names of the tensors that each becomes. Several names
            cut it in equal parts: a convolution over time into one per time step, anything else along its outputs.
        vision_metadata: A config to the values of the mmproj file that follow from it.
        image_text: What the chat template writes for an image; llama.cpp puts all of it around an image by itself.
        row_break_token: Token whose embedding llama.cpp puts behind every row of an image; None where there is none.
    """

    architecture: str
    pre_tokenizer: str
    projector: str
    interleaved_language: bool
    interleaved_vision: bool
    vision_names: tuple[tuple[str, tuple[str, ...]], ...]
    vision_metadata: Callable[[Mapping[str, Any]], dict[str, Value]]
    image_text: str
    row_break_token: str | None = None


def _required(section: Mapping[str, Any], key: str, expected: Any) -> None:
    """llama.cpp has some values built in; with others the same weights would give something else."""
    if section.get(key) != expected:
        raise ExportError(
            f"export.types has 'gguf', but this model has {key} {section.get(key)!r} and llama.cpp computes with {expected!r};"
            " leave 'gguf' out"
        )


def _activation(vision: Mapping[str, Any]) -> dict[str, Value]:
    known: dict[str, dict[str, Value]] = {
        "quick_gelu": {},
        "gelu": {"clip.use_gelu": True},
        "silu": {"clip.use_silu": True},
    }
    if vision["hidden_act"] not in known:
        raise ExportError(
            f"export.types has 'gguf', but llama.cpp has no activation {vision['hidden_act']!r} in vision towers; leave"
            " 'gguf' out"
        )
    return known[vision["hidden_act"]]


def qwen_metadata(config: Mapping[str, Any]) -> dict[str, Value]:
    """Of Qwen2-VL's and Qwen2.5-VL's towers.

    Args:
        config: Content of a `config.json` with all defaults.

    Raises:
        ExportError: The tower has settings that llama.cpp does not know.
    """
    vision = config["vision_config"]
    _required(vision, "temporal_patch_size", 2)
    _required(vision, "spatial_merge_size", 2)
    found: dict[str, Value] = {
        # For the memory that is set aside; images of any size are taken.
        "clip.vision.image_size": 560,
        "clip.vision.block_count": vision["depth"],
        "clip.vision.attention.head_count": vision["num_heads"],
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.spatial_merge_size": vision["spatial_merge_size"],
        **_activation(vision),
    }
    if "embed_dim" in vision:
        found["clip.vision.embedding_length"] = vision["embed_dim"]
        found["clip.vision.feed_forward_length"] = int(vision["embed_dim"] * vision["mlp_ratio"])
        return _with_told_apart_layers(found)
    _required(vision, "window_size", 112)
    full = sorted(vision["fullatt_block_indexes"])
    depth = vision["depth"]
    # Every n-th layer has full attention; 0 stands for all of them, and a period beyond the last layer for none.
    period = full[0] + 1 if full else depth + 1
    if full != [block for block in range(depth) if (block + 1) % period == 0]:
        raise ExportError(
            f"export.types has 'gguf', but the vision tower's layers {full} have full attention, and llama.cpp takes every"
            f" {period}-th of {depth} only; leave 'gguf' out"
        )
    found["clip.vision.n_wa_pattern"] = 0 if period == 1 else period
    found["clip.vision.embedding_length"] = vision["hidden_size"]
    found["clip.vision.feed_forward_length"] = vision["intermediate_size"]
    return _with_told_apart_layers(found)


def _with_told_apart_layers(found: dict[str, Value]) -> dict[str, Value]:
    """Old files had a block's two feed-forward layers swapped, which llama.cpp recognises by their width."""
    width = found["clip.vision.embedding_length"]
    if found["clip.vision.feed_forward_length"] == width:
        raise ExportError(
            f"export.types has 'gguf', but the vision tower's feed-forward layers are as wide as its blocks ({width}), and"
            " llama.cpp then swaps them; leave 'gguf' out"
        )
    return found


def pixtral_metadata(config: Mapping[str, Any]) -> dict[str, Value]:
    """Of the tower of Pixtral and Mistral 3.

    Args:
        config: Content of a `config.json` with all defaults.

    Raises:
        ExportError: The tower has settings that llama.cpp does not know.
    """
    vision = config["vision_config"]
    _required(config, "vision_feature_layer", -1)
    _required(config, "projector_hidden_act", "gelu")
    _required(vision.get("rope_parameters") or {}, "rope_theta", 10000.0)
    found: dict[str, Value] = {
        "clip.vision.image_size": vision["image_size"],
        "clip.vision.block_count": vision["num_hidden_layers"],
        "clip.vision.attention.head_count": vision["num_attention_heads"],
        "clip.vision.attention.layer_norm_epsilon": 1e-5,
        "clip.vision.embedding_length": vision["hidden_size"],
        "clip.vision.feed_forward_length": vision["intermediate_size"],
        **_activation(vision),
    }
    if "spatial_merge_size" in config:
        found["clip.vision.spatial_merge_size"] = config["spatial_merge_size"]
    return found


def _qwen_layout(mlp: tuple[tuple[str, tuple[str, ...]], ...], projector: str) -> GgufLayout:
    block = r"model\.visual\.blocks\.(\d+)\."
    ending = r"\.(weight|bias)"
    return GgufLayout(
        architecture="qwen2vl",
        pre_tokenizer="qwen2",
        projector=projector,
        interleaved_language=False,
        interleaved_vision=False,
        vision_names=(
            (r"model\.visual\.patch_embed\.proj\.weight", ("v.patch_embd.weight", "v.patch_embd.weight.1")),
            (block + "norm([12])" + ending, (r"v.blk.\1.ln\2.\3",)),
            (block + r"attn\.qkv" + ending, tuple(rf"v.blk.\1.attn_{part}.\2" for part in "qkv")),
            (block + r"attn\.proj" + ending, (r"v.blk.\1.attn_out.\2",)),
            *((block + r"mlp\." + name + ending, names) for name, names in mlp),
            (r"model\.visual\.merger\.ln_q" + ending, (r"v.post_ln.\1",)),
            (r"model\.visual\.merger\.mlp\.([02])" + ending, (r"mm.\1.\2",)),
        ),
        vision_metadata=qwen_metadata,
        image_text="<|vision_start|><|image_pad|><|vision_end|>",
    )


_GATED = tuple((f"{name}_proj", (rf"v.blk.\1.ffn_{name}.\2",)) for name in ("gate", "up", "down"))
QWEN2_VL_GGUF = _qwen_layout((("fc1", (r"v.blk.\1.ffn_up.\2",)), ("fc2", (r"v.blk.\1.ffn_down.\2",))), "qwen2vl_merger")
QWEN2_5_VL_GGUF = _qwen_layout(_GATED, "qwen2.5vl_merger")

_LAYER = r"model\.vision_tower\.transformer\.layers\.(\d+)\."
_PROJECTOR = r"model\.multi_modal_projector\."
PIXTRAL_GGUF = GgufLayout(
    architecture="llama",
    pre_tokenizer="pixtral",
    projector="pixtral",
    interleaved_language=True,
    interleaved_vision=True,
    vision_names=(
        (r"model\.vision_tower\.patch_conv\.weight", ("v.patch_embd.weight",)),
        (r"model\.vision_tower\.ln_pre\.weight", ("v.pre_ln.weight",)),
        (_LAYER + r"attention_norm\.weight", (r"v.blk.\1.ln1.weight",)),
        (_LAYER + r"ffn_norm\.weight", (r"v.blk.\1.ln2.weight",)),
        (_LAYER + r"attention\.([qkv])_proj\.weight", (r"v.blk.\1.attn_\2.weight",)),
        (_LAYER + r"attention\.o_proj\.weight", (r"v.blk.\1.attn_out.weight",)),
        (_LAYER + r"feed_forward\.(gate|up|down)_proj\.weight", (r"v.blk.\1.ffn_\2.weight",)),
        (_PROJECTOR + r"linear_([12])\.(weight|bias)", (r"mm.\1.\2",)),
        (_PROJECTOR + r"norm\.weight", ("mm.input_norm.weight",)),
        (_PROJECTOR + r"patch_merger\.merging_layer\.weight", ("mm.patch_merger.weight",)),
    ),
    vision_metadata=pixtral_metadata,
    image_text="[IMG]",
    row_break_token="[IMG_BREAK]",
)
