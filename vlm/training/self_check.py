"""Every kernel that a training is about to use on a GPU, against its plain form on that very GPU, in a second or two.

Kernels are compiled on the spot for whatever card and versions are there, which no test elsewhere can vouch for. A wrong
one would not crash but train a worse model. So each runs once on a few odd-shaped random numbers, forward and backward,
and must agree with plain operations in float32 within rounding. Loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm.errors import ResourceError

if TYPE_CHECKING:
    from vlm.config import TrainingConfig

Forms = tuple[dict[str, Tensor], dict[str, Tensor]]
# Of the norm. Outputs are rounded once, gradients up to three times, by up to 2^-9 (bfloat16) each; sums over rows average
# that out. A wrong sign, a missing term or a shifted row is an error of about 1.
_ALLOWED = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
_LENGTHS = (5, 33, 1, 90)


def check_kernels(
    training: TrainingConfig,
    *,
    device: str,
    dtype: torch.dtype,
    packing: bool,
    quantized: bool,
    embedding_on_host: bool = False,
) -> list[str]:
    """Compares.

    Args:
        training: Says whether fused pieces are used.
        device: Where the training runs; on a CPU there are no kernels of ours, and nothing needs checking.
        dtype: Of its computation.
        packing: Whether rows are packed.
        quantized: Whether the base is stored in NF4.
        embedding_on_host: Whether the input embedding lies in the host's memory.

    Returns:
        Names of what was compared.

    Raises:
        ResourceError: One differs from its plain form by more than rounding; names it and the setting without it.
    """
    checks: list[tuple[str, str, Callable[[str, torch.dtype], Forms]]] = []
    if training.fused_kernels:
        checks += [("fused_kernels to false", name, check) for name, check in _PIECES.items()]
        if quantized:
            checks.append(("fused_kernels to false", "NF4 dequantisation", _dequantization))
    if packing:
        checks.append(("packing to false", "packed attention", _attention))
    if embedding_on_host:
        checks.append(("activation_memory to 'recompute'", "embedding in host memory", _host_embedding))
    done = []
    for remedy, name, check in checks:
        found, expected = check(device, dtype)
        for part, tensor in expected.items():
            error = _distance(found[part], tensor)
            if not error <= _ALLOWED[dtype]:
                raise ResourceError(
                    f"{name} ({part}) gives results on {_device_name(device)} with torch {torch.__version__} that are"
                    f" {error:.2g} away from its plain form, where rounding allows {_ALLOWED[dtype]:.2g}; set"
                    f" training.{remedy}, and report this"
                )
        done.append(name)
    return done


def _distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "the CPU"


def _numbers(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return make


def _both(function: Callable[..., Any], plain: Callable[..., Any], *inputs: Tensor) -> Forms:
    """Outputs and gradients of a function as it is and of its plain form in float32."""
    return _with_gradients(function, inputs), _with_gradients(plain, [tensor.float() for tensor in inputs])


def _with_gradients(function: Callable[..., Any], inputs: Any) -> dict[str, Tensor]:
    leaves = [tensor.detach().requires_grad_(True) for tensor in inputs]
    output = function(*leaves)
    outputs = output if isinstance(output, tuple) else (output,)
    # Any fixed weights will do, if they differ from place to place.
    loss = sum((part.float() * torch.linspace(-1, 1, part.shape[-1], device=part.device)).sum() for part in outputs)
    gradients = torch.autograd.grad(loss, leaves)
    named = {f"output {number}": part.detach() for number, part in enumerate(outputs)}
    return named | {f"gradient {number}": gradient for number, gradient in enumerate(gradients)}


def _norm(device: str, dtype: torch.dtype) -> Forms:
    from vlm.kernels.rms_norm import rms_norm, rms_norm_eager

    make = _numbers(device, dtype)
    weight = make(192)
    return _both(
        lambda x: rms_norm(x, weight, 1e-6), lambda x: rms_norm_eager(x, weight.float(), 1e-6), make(3, 7, 192)
    )


def _layer_norm(device: str, dtype: torch.dtype) -> Forms:
    from vlm.kernels.layer_norm import layer_norm, layer_norm_eager

    make = _numbers(device, dtype)
    weight, bias = make(192), make(192)
    return _both(
        lambda x: layer_norm(x, weight, bias, 1e-6),
        lambda x: layer_norm_eager(x, weight.float(), bias.float(), 1e-6),
        make(3, 7, 192),
    )


def _activations(device: str, dtype: torch.dtype) -> Forms:
    from vlm.kernels.activation import activate, activate_backward

    functional = torch.nn.functional
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": functional.silu,
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }
    make = _numbers(device, dtype)
    found: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, function in plain.items():
        gated = name == "silu"
        parts, slope = [make(13, 200) for _ in range(2 if gated else 1)], make(13, 200)
        leaves = [part.detach().float().requires_grad_(True) for part in parts]
        output = function(leaves[0]) * leaves[1] if gated else function(leaves[0])
        expected[f"{name} output"] = output.detach()
        expected[f"{name} gradient"] = torch.cat(torch.autograd.grad(output, leaves, slope.float()), 1)
        inner = torch.cat(parts, 1)
        found[f"{name} output"] = out = torch.empty_like(slope)
        activate(inner, function, gated=gated, out=out, name=name)
        # The slope stands where the gradient of the last part comes.
        found[f"{name} gradient"] = gradient = torch.cat([slope] * len(parts), 1)
        activate_backward(inner, function, gated=gated, gradient=gradient, name=name)
    return found, expected


def _rotary(device: str, dtype: torch.dtype) -> Forms:
    from vlm.kernels.rotary import rotary, rotary_eager

    make = _numbers(device, dtype)
    # Different in both layouts for every value of a head.
    angles = make(1, 11, 48).float()
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    # Strided as attention layers have them: heads behind the sequence in memory.
    queries, keys = (make(1, 11, heads, 48).transpose(1, 2) for heads in (4, 2))

    def all_layouts(function: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> tuple[Tensor, ...]:
        return (*function(*inputs), *function(*inputs, interleaved=True))

    return _both(
        lambda q, k: all_layouts(rotary, q, k, cos, sin),
        lambda q, k: all_layouts(rotary_eager, q, k, cos.float(), sin.float()),
        queries,
        keys,
    )


def _dequantization(device: str, dtype: torch.dtype) -> Forms:
    import bitsandbytes.functional as bnb

    from vlm.kernels.frozen_linear import dequantize_into, dequantized

    weight = _numbers(device, dtype)(48, 128)
    packed, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    # Rows beside each other, and with room for an update between them.
    bordered = weight.new_empty(48, 136)[:, :128]
    dequantize_into(packed, state, bordered)
    expected = bnb.dequantize_4bit(packed, state)
    return {"weight": dequantized(packed, state, dtype), "bordered": bordered}, {
        "weight": expected,
        "bordered": expected,
    }


def _host_embedding(device: str, dtype: torch.dtype) -> Forms:
    from vlm.kernels.host_embedding import copy_on_host, host_embedding, host_embedding_eager, unpin

    table = _numbers(device, dtype)(37, 2500)
    ids = torch.tensor([[36, 0, 5], [5, 35, 36]], device=device)
    host = copy_on_host(table)
    try:
        return {"rows": host_embedding(ids, host)}, {"rows": host_embedding_eager(ids, table)}
    finally:
        unpin(host)


def _attention(device: str, dtype: torch.dtype) -> Forms:
    """Both directions of sight, grouped heads, and a neighbour that holds no numbers."""
    from vlm.packing.attention import Segments, attend

    make = _numbers(device, dtype)
    total = sum(_LENGTHS)
    inputs = make(1, 4, total, 64), make(1, 2, total, 64), make(1, 2, total, 64)
    segments = Segments.of_lengths(_LENGTHS, torch.device(device))
    found: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for causal in (True, False):
        name = "causal" if causal else "full"
        forms = _both(
            lambda q, k, v, causal=causal: attend(q, k, v, segments, causal=causal),
            lambda q, k, v, causal=causal: _plain_attention(q, k, v, causal),
            *inputs,
        )
        for target, values in zip((found, expected), forms, strict=True):
            target |= {f"{name} {part}": tensor for part, tensor in values.items()}
    # The second segment, so that there are rows on both sides of it.
    others = torch.ones(total, dtype=torch.bool, device=device)
    others[_LENGTHS[0] : _LENGTHS[0] + _LENGTHS[1]] = False
    query, key, value = (tensor.masked_fill(~others[:, None], torch.nan) for tensor in inputs)
    found["neighbour"] = attend(query, key, value, segments, causal=True)[:, others]
    expected["neighbour"] = expected["causal output 0"][:, others]
    return found, expected


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Scores written out, a segment at a time. Shape [1, queries, heads, head]."""
    return torch.cat(list(_plain_segments(query, key, value, causal)), 1)


def _plain_segments(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Iterator[Tensor]:
    repeats = query.shape[1] // key.shape[1]
    start = 0
    for length in _LENGTHS:
        q, k, v = (tensor[:, :, start : start + length] for tensor in (query, key, value))
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if causal:
            later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        yield (scores.softmax(-1) @ v).transpose(1, 2)
        start += length


_PIECES: dict[str, Callable[[str, torch.dtype], Forms]] = {
    "RMSNorm": _norm,
    "LayerNorm": _layer_norm,
    "activations": _activations,
    "rotary embedding": _rotary,
}
