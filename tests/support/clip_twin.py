"""What llama.cpp computes from an mmproj file, in plain torch: read off its graphs, without any code of this project.

Images are one at a time, and no larger than one attention window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

Tensors = Mapping[str, torch.Tensor]


def read_gguf(path: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, dequantised to float32, slowest dimension first; and the values of the head."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).view(
            *reversed([int(size) for size in tensor.shape])
        )
        for tensor in reader.tensors
    }
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def linear(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def norm(tensors: Tensors, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm where there is a bias, RMSNorm where there is none."""
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def tower(
    tensors: Tensors, head: Mapping[str, Any], x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """The transformer blocks: `x` of shape [patches, width]; positions of each patch."""
    num_heads = head["clip.vision.attention.head_count"]
    eps = head["clip.vision.attention.layer_norm_epsilon"]
    act = F.silu if head.get("clip.use_silu") else F.gelu if head.get("clip.use_gelu") else quick_gelu
    interleaved = head["clip.projector_type"] == "pixtral"
    for number in range(head["clip.vision.block_count"]):
        block = f"v.blk.{number}"
        y = norm(tensors, f"{block}.ln1", x, eps)
        q, k, v = (
            linear(tensors, f"{block}.attn_{part}", y).unflatten(-1, (num_heads, -1)).transpose(0, 1) for part in "qkv"
        )
        rotate = rotate_pairs if interleaved else rotate_halves
        q, k = rotate(q, rows, columns), rotate(k, rows, columns)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        x = x + linear(tensors, f"{block}.attn_out", attended)
        y = norm(tensors, f"{block}.ln2", x, eps)
        up = linear(tensors, f"{block}.ffn_up", y)
        gate = f"{block}.ffn_gate"
        up = act(linear(tensors, gate, y)) * up if f"{gate}.weight" in tensors else act(up)
        x = x + linear(tensors, f"{block}.ffn_down", up)
    return x


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def rotate_halves(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Number i turns with number i + n/2; the first quarter by the row, the second by the column."""
    size = x.shape[-1]
    frequency = 10000.0 ** (-torch.arange(size // 4) * 4 / size)
    angle = torch.cat([rows[:, None] * frequency, columns[:, None] * frequency], dim=-1)
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def rotate_pairs(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Neighbours turn together.

    The first half of the numbers turns by the row, with the even of n/2 frequencies, the second half by the column, with
    the odd ones.
    """
    size = x.shape[-1]
    frequency = 10000.0 ** (-torch.arange(size // 2) * 2 / size)
    angle = torch.cat([rows[:, None] * frequency[::2], columns[:, None] * frequency[1::2]], dim=-1)
    even, odd = x[..., ::2], x[..., 1::2]
    turned = (even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin())
    return torch.stack(turned, dim=-1).flatten(-2)


def qwen_features(tensors: Tensors, head: Mapping[str, Any], patches: torch.Tensor, grid: tuple[int, int]) -> Any:
    """Projected features; `patches` of shape [patches, 3 * 2 * size * size], squares of four one after the other."""
    size = head["clip.vision.patch_size"]
    pixels = patches.view(-1, 3, 2, size, size)
    kernels = (tensors["v.patch_embd.weight"], tensors["v.patch_embd.weight.1"])
    x = sum(F.conv2d(pixels[:, :, time], kernel).flatten(1) for time, kernel in enumerate(kernels))
    height, width = grid
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
    places = places.view(height // 2, 2, width // 2, 2, 2).transpose(1, 2).reshape(-1, 2)
    x = tower(tensors, head, x, places[:, 0], places[:, 1])
    x = norm(tensors, "v.post_ln", x, head["clip.vision.attention.layer_norm_epsilon"])
    x = x.view(len(x) // 4, -1)
    return linear(tensors, "mm.2", F.gelu(linear(tensors, "mm.0", x)))


def pixtral_features(tensors: Tensors, head: Mapping[str, Any], pixels: torch.Tensor) -> torch.Tensor:
    """Projected features of one image; `pixels` of shape [1, 3, height, width]."""
    eps = head["clip.vision.attention.layer_norm_epsilon"]
    maps = F.conv2d(pixels, tensors["v.patch_embd.weight"], stride=head["clip.vision.patch_size"])
    height, width = maps.shape[-2:]
    x = norm(tensors, "v.pre_ln", maps.flatten(2)[0].T, eps)
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    x = tower(tensors, head, x, places[:, 0], places[:, 1])
    if "mm.patch_merger.weight" in tensors:
        merge = head["clip.vision.spatial_merge_size"]
        x = norm(tensors, "mm.input_norm", x, eps)
        squares = F.unfold(x.T.view(1, -1, height, width), merge, stride=merge)[0].T
        x = linear(tensors, "mm.patch_merger", squares)
    return linear(tensors, "mm.2", F.gelu(linear(tensors, "mm.1", x)))
