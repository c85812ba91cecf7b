"""How much device memory a training step needs, estimated from shapes alone.

What a layer keeps per position for its backward pass, in values, with H its width, I the width of its feed-forward block
and K that of its keys (Q is H):

- with the fused pieces (`vlm.kernels`): inputs and outputs of both norms 4 H; rotated queries and the attention's output
  2 H; keys and values 2 K; outputs of gate and up 2 I (a plain block: I). Where one projection makes queries, keys and
  values, the values are a part of its output and keep all of it alive: 2 H more.
- without, and where the layers' own weights learn: about ``12 H + 6.5 I``, float32 copies of inputs included. Checked against
  two measurements: Qwen2.5-VL-7B in NF4, 12,288 tokens in one row, 13.5 GiB with and 112 GiB without recomputation; eight
  layers of Pixtral 12B trained whole, whose tensors were counted one by one: a tenth fewer.

A recomputed layer keeps its input, and is whole again while its backward pass runs. Layers that are CUDA graphs
(`vlm.training.capture`) work on padded rows; their inputs and the last one's output lie at fixed addresses, with two more for
gradients, and stay there while the other tower is at work. What a graph works in is nobody else's while it exists, and
the same again is needed where the layer runs without one, as it does before it is recorded.

Where images are looked at through layers of their own (`vlm.families.family.CrossAttention`), each of these keeps keys and
values of all image positions, the projections' outputs among them, beside the text; features wait until the last of them
has run backward, and their gradient grows meanwhile. Checked against tensors counted one by one at the shapes of Llama 3.2
Vision 90B and 11B.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vlm.families import Family
from vlm.families.family import CrossAttention
from vlm.kernels.limits import HEAD_CHUNK_BYTES, HEAD_COPIES
from vlm.training.activation import LAUNCH_BOUND_OPERATIONS, ActivationPlan, rounded

_HIDDEN_UNITS, _INTERMEDIATE_UNITS = 12.0, 6.5
# While a fused layer runs backward: gradients as wide as its feed-forward block (of gate and up; of a plain block before and
# after the activation, and the activation itself), and a few as wide as the layer.
_BACKWARD_HIDDEN_UNITS, _BACKWARD_GATED_UNITS, _BACKWARD_PLAIN_UNITS = 4.0, 2.0, 3.0
_UNFUSED_TEMPORARIES = 0.4
# Beside the layers: embeddings before and after image features are put in, the last norm's input and output, a gradient.
_OUTSIDE_HIDDEN_UNITS = 5.0
# Inputs on their way to the host's memory or back.
_OFFLOADS_IN_FLIGHT = 2
# Fixed addresses of a captured tower beside its layers' inputs: the last output, and gradients in two places in turn.
_MORE_SLOTS = 3
# PyTorch gives each thread that multiplies matrices (one forward, one backward) such a workspace on each stream that it does
# so on; graphs of each tower are recorded on one more. This is its size on cards since Hopper; older ones take a quarter.
_WORKSPACE_BYTES, _THREADS = 32 * 2**20, 2
# Cross-attention, per position of the tower: keys before and after their norm, values, and copies where a text looks at some
# tiles only; gradients of the three while it runs backward. Per token: queries before their norm, and a copy of outputs.
_CROSS_KEY_UNITS, _CROSS_GRADIENT_UNITS, _CROSS_TEXT_UNITS = 4.0, 3.0, 2.0
# The sum of the features' gradients, and the next one to be added.
_FEATURE_GRADIENTS = 2
# The share of the activation estimate that no run has been seen to stay under.
_CERTAIN_SHARE = 0.7
# Of a weight in NF4: half a byte, and its share of the scales.
NF4_BYTES = 0.53
# Layers that are whole at once where they are spread over GPUs: the one that computes and the one that is fetched.
_WHOLE_LAYERS = 2
# The optimiser's state, for each trained weight.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0}


@dataclass(frozen=True)
class Tower:
    """The widths of one stack of transformer layers."""

    num_layers: int
    """Layers in the stack."""
    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width inside the feed-forward layers."""
    key_value: int
    """Width of the keys, and of the values."""
    gated: bool = True
    """Whether feed-forward blocks have a gate."""
    joint: bool = False
    """Whether one projection makes queries, keys and values."""

    def cast_weights(self, num_recomputed: int | None) -> int:
        """Weights of which a cast copy waits for the way back, where the layers' own weights learn.

        Args:
            num_recomputed: Layers that are recomputed, from the first on; None for all. Of these, one at a time has copies.
        """
        num_kept = 0 if num_recomputed is None else self.num_layers - num_recomputed
        return self.layer_weights * min(self.num_layers, num_kept + 1)

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of one layer."""
        feed_forward = (3 if self.gated else 2) * self.intermediate
        return self.hidden * (2 * self.hidden + 2 * self.key_value + feed_forward)

    def kept_values(self, *, fused: bool) -> float:
        """Values that a layer keeps per position for its backward pass.

        Args:
            fused: Whether it runs with the fused pieces.
        """
        if not fused:
            return _HIDDEN_UNITS * self.hidden + _INTERMEDIATE_UNITS * self.intermediate
        attention = 2 * self.hidden + 2 * self.key_value + (2 * self.hidden if self.joint else 0)
        return 4 * self.hidden + attention + (2 if self.gated else 1) * self.intermediate

    def working_values(self, *, fused: bool) -> float:
        """Values per position that live while one layer runs backward, beside what it kept.

        Args:
            fused: Whether it runs with the fused pieces.
        """
        if not fused:
            return _UNFUSED_TEMPORARIES * self.kept_values(fused=False)
        inner = _BACKWARD_GATED_UNITS if self.gated else _BACKWARD_PLAIN_UNITS
        return _BACKWARD_HIDDEN_UNITS * self.hidden + inner * self.intermediate

    def activation_bytes(
        self,
        length_tokens: int,
        value_bytes: int,
        *,
        num_recomputed: int | None,
        offload: bool = False,
        trained: bool = True,
        whole: bool = False,
        fused: bool = True,
        captured: bool = False,
    ) -> tuple[float, float]:
        """Bytes that wait for the backward pass, and bytes beside them while it runs through these layers.

        Args:
            length_tokens: Tokens (or patches) in one pass, padding included.
            value_bytes: Bytes of one activation.
            num_recomputed: Layers that are recomputed; None for all.
            offload: Whether their inputs wait in the host's memory.
            trained: False for a frozen stack, which keeps no graph.
            whole: Whether its own weights learn, in float32: so is what runs between its layers, and no piece is fused.
            fused: Whether the fused pieces are used.
            captured: Whether layers may be replayed as CUDA graphs.

        Returns:
            The estimates.
        """
        fused = fused and not whole
        # Of a position between layers, in units of a value.
        between = self.hidden * (4 / value_bytes if whole else 1)
        layer = self.kept_values(fused=fused)
        if num_recomputed is None:
            num_recomputed = self.num_layers
        num_kept = self.num_layers - num_recomputed
        unit = length_tokens * value_bytes
        if not trained:
            return 0.0, unit * (layer + _OUTSIDE_HIDDEN_UNITS * between)
        waiting = num_kept * layer
        slots = self.slot_bytes(length_tokens, value_bytes) if captured else 0.0
        if slots:
            unit = rounded(length_tokens) * value_bytes
        working = self.working_values(fused=fused) + _OUTSIDE_HIDDEN_UNITS * between
        if num_recomputed:
            working += layer
            if not slots:
                waiting += (min(num_recomputed, _OFFLOADS_IN_FLIGHT) if offload else num_recomputed) * between
        return unit * waiting + slots, unit * working

    def pool_bytes(self, length_tokens: int, value_bytes: int, *, recomputed: bool, fused: bool) -> float:
        """Bytes that CUDA graphs work in, apart from those that the same layers take without; 0 where there are none.

        Args:
            length_tokens: As above.
            value_bytes: As above.
            recomputed: Whether any layer is.
            fused: As above.
        """
        if not self.slot_bytes(length_tokens, value_bytes):
            return 0.0
        layer = self.working_values(fused=fused) + (self.kept_values(fused=fused) if recomputed else 0)
        return rounded(length_tokens) * value_bytes * layer

    def slot_bytes(self, length_tokens: int, value_bytes: int) -> float:
        """Bytes at fixed addresses where layers may be replayed as CUDA graphs; 0 where a row is too long for that.

        Args:
            length_tokens: As above.
            value_bytes: As above.
        """
        if not 0 < 4.0 * length_tokens * self.layer_weights < LAUNCH_BOUND_OPERATIONS:
            return 0.0
        return float((self.num_layers + _MORE_SLOTS) * self.hidden * rounded(length_tokens) * value_bytes)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device at the peak of the costliest step."""

    weights_bytes: int
    """The checkpoint as stored, without what lies in the host's memory."""
    adapter_bytes: int
    """Adapter weights, their gradients and the optimiser's state."""
    language_bytes: int
    """Activations of the costliest micro-batch while the language model runs backward."""
    vision_bytes: int
    """Activations while the vision tower does, whose turn comes last."""
    logits_bytes: int
    """The language-model head over one chunk of supervised tokens; where it learns, what it sums its gradient in."""
    dense_bytes: int
    """Weights of the widest product, which are made or put together while it runs."""
    cast_bytes: int
    """Copies, in the precision of computation, of float32 weights that learn themselves: until their layer's way back."""
    workspace_bytes: int
    """Workspaces of the matrix library."""
    pool_bytes: int
    """Memory that only CUDA graphs work in; the allocator has it reserved and not allocated."""

    @property
    def activations_bytes(self) -> int:
        """Activations at the peak."""
        return max(self.language_bytes, self.vision_bytes)

    @property
    def expected_bytes(self) -> int:
        """What the step probably has allocated at its peak."""
        return self.fixed_bytes + self.activations_bytes

    @property
    def fixed_bytes(self) -> int:
        """All of it but activations."""
        beside = self.logits_bytes + self.dense_bytes + self.cast_bytes + self.workspace_bytes
        return self.weights_bytes + self.adapter_bytes + beside

    @property
    def reserved_bytes(self) -> int:
        """What there must be for it: with what is set aside for CUDA graphs."""
        return self.expected_bytes + self.pool_bytes

    @property
    def at_least_bytes(self) -> int:
        """What it needs even where the estimate errs upwards."""
        return self.weights_bytes + self.adapter_bytes + int(_CERTAIN_SHARE * self.activations_bytes)


def towers(config: Mapping[str, Any], family: Family) -> tuple[Tower, Tower, int]:
    """Reads the widths from a model's ``config.json``.

    Args:
        config: Its content.
        family: Its row of the table.

    Returns:
        The language model, the vision tower, and the patches behind one visual token.
    """
    text = config.get("text_config") or config
    vision = config.get("vision_config") or {}
    sam = vision.get("sam_config")
    if sam:
        # Two encoders, of which the first sees every patch, and the second what is left after halving both sides a few
        # times, which is a tenth of the work.
        vision = {**sam, "intermediate_size": sam.get("mlp_dim")}
        vision["spatial_merge_size"] = 2 ** len(sam.get("downsample_channels") or (0, 0))
    hidden = int(text["hidden_size"])
    num_heads = int(text.get("num_attention_heads") or 1)
    head_width = int(text.get("head_dim") or hidden // num_heads)
    language = Tower(
        int(text["num_hidden_layers"]),
        hidden,
        int(text["intermediate_size"]),
        int(text.get("num_key_value_heads") or num_heads) * head_width,
    )
    # `embed_dim` first: where a vision configuration has both, its `hidden_size` is the language model's width.
    width = int(vision.get("embed_dim") or vision.get("hidden_size") or 0)
    inner = int(vision.get("intermediate_size") or width * float(vision.get("mlp_ratio") or 4))
    # Llama 3.2 Vision has a second encoder behind the first; Mistral 3 merges patches outside the tower.
    depth = int(vision.get("depth") or vision.get("num_hidden_layers") or 0) + int(vision.get("num_global_layers") or 0)
    merge_size = int(vision.get("spatial_merge_size") or config.get("spatial_merge_size") or 1)
    gated, joint = (
        re.search(rf"\b{word}\b", pattern) is not None
        for word, pattern in (("gate", family.vision_mlp), ("qkv", family.vision_attention))
    )
    return language, Tower(depth, width, inner, width, gated, joint), merge_size**2


def kept_of_spread(
    language: Tower,
    num_spread: int,
    *,
    weights_bytes: int,
    num_trainable: int,
    stored_bytes: float,
    trains_layers: bool,
) -> tuple[int, int]:
    """What one GPU holds where the language model's layers are spread over several.

    Args:
        language: The language model.
        num_spread: GPUs.
        weights_bytes: Of all frozen weights.
        num_trainable: Trained parameters.
        stored_bytes: Of one frozen weight of a layer.
        trains_layers: Whether the layers' own weights learn, in float32; else they are frozen.

    Returns:
        `weights_bytes` and `num_trainable` of one GPU, layers that are whole for a while among the former.
    """
    in_layers = language.num_layers * language.layer_weights
    gone = 1 - 1 / num_spread
    if trains_layers:
        # Weights and gradients of whole layers.
        whole = _WHOLE_LAYERS * language.layer_weights * 8
        return weights_bytes + whole, int(num_trainable - gone * min(num_trainable, in_layers))
    whole = int(_WHOLE_LAYERS * language.layer_weights * stored_bytes)
    return int(weights_bytes - gone * min(weights_bytes, in_layers * stored_bytes)) + whole, num_trainable


def estimate_memory(
    config: Mapping[str, Any],
    family: Family,
    *,
    weights_bytes: int,
    num_trainable: int,
    trains_vision: bool,
    length_tokens: int,
    num_visual_tokens: int,
    value_bytes: int,
    activations: ActivationPlan,
    fused: bool,
    optimizer: str,
    trained_whole: Collection[str] = (),
    head_learns: bool = False,
    is_spread: bool = False,
    patches_per_token: int | None = None,
    on_gpu: bool = True,
) -> MemoryEstimate:
    """Estimates one step.

    Args:
        config: The model's ``config.json``.
        family: Its row of the table.
        weights_bytes: Size of the stored checkpoint.
        num_trainable: Trained parameters.
        trains_vision: Whether an adapter sits in the vision tower.
        length_tokens: Padded tokens of the micro-batch.
        num_visual_tokens: Visual tokens in it.
        value_bytes: Bytes of one activation.
        activations: Which layers are recomputed, what lies in the host's memory, and whether there are CUDA graphs.
        fused: Whether the fused pieces are used.
        optimizer: ``adamw`` or ``adamw_8bit``.
        trained_whole: Parts of the model whose own weights learn, in float32.
        head_learns: Whether the language-model head's own weights do.
        is_spread: Whether the language model's layers are spread over GPUs: they are put together in the precision of
            computation, but for those with routed experts.
        patches_per_token: Patches behind one visual token, where the configuration does not tell.
        on_gpu: Whether products run on a GPU, whose library has workspaces.

    Returns:
        The parts of the estimate.
    """
    language, vision, merged_patches = towers(config, family)
    captured = activations.cuda_graphs and not activations.offload
    num_positions = num_visual_tokens * (patches_per_token or merged_patches)
    language_waits, language_works = language.activation_bytes(
        length_tokens,
        value_bytes,
        num_recomputed=activations.recomputed_language,
        offload=activations.offload,
        whole="language" in trained_whole,
        fused=fused,
        captured=captured,
    )
    vision_waits, vision_works = vision.activation_bytes(
        num_positions,
        value_bytes,
        num_recomputed=activations.recomputed_vision,
        offload=activations.offload,
        trained=trains_vision,
        whole="vision" in trained_whole,
        fused=fused,
        captured=captured,
    )
    if family.cross_attention is not None and num_positions:
        cross = family.cross_attention(config)
        waits, works = _cross_bytes(
            cross, language, length_tokens, num_positions, value_bytes, activations.recomputed_language
        )
        language_waits, language_works = language_waits + waits, language_works + works
        mask = float(num_positions * cross.mask_values * value_bytes)
        if trains_vision:
            vision_waits += mask
        else:
            vision_works += mask
    slots = pool = 0.0
    if captured:
        # Slots of one tower stay while the other runs backward, whose turn comes last.
        slots = language.slot_bytes(length_tokens, value_bytes)
        pools = [
            tower.pool_bytes(length, value_bytes, recomputed=number != 0, fused=fused)
            for tower, length, number in (
                (language, length_tokens, activations.recomputed_language),
                (vision, num_positions * trains_vision, activations.recomputed_vision),
            )
        ]
        # Both work in the same memory where nothing of one outlives its pass.
        pool = max(pools) if activations.recomputes_all else sum(pools)
    cast = 0
    if value_bytes < 4:
        if "language" in trained_whole and (not is_spread or family.language_expert_parameters):
            cast += language.cast_weights(activations.recomputed_language)
        if "vision" in trained_whole:
            cast += vision.cast_weights(activations.recomputed_vision)
    vocabulary = int((config.get("text_config") or config).get("vocab_size") or config.get("vocab_size") or 0)
    # Its copy in the precision of computation, and a gradient of its own in float32.
    head = vocabulary * language.hidden * (value_bytes + 4) if head_learns else 0
    return MemoryEstimate(
        weights_bytes=weights_bytes
        - (vocabulary * language.hidden * value_bytes if activations.embedding_on_host else 0),
        adapter_bytes=int(num_trainable * (4 + 4 + OPTIMIZER_BYTES[optimizer])),
        # The backward pass is through with the language model when it comes to the vision tower.
        language_bytes=int(vision_waits + language_waits + language_works),
        vision_bytes=int(vision_waits + slots + vision_works),
        pool_bytes=int(pool),
        # The fused block of gate and up is one product. Of what learns there is a gradient in both precisions.
        dense_bytes=language.hidden
        * language.intermediate
        * (value_bytes + 4 if "language" in trained_whole else value_bytes * (2 if fused and language.gated else 1)),
        cast_bytes=cast * value_bytes,
        workspace_bytes=_WORKSPACE_BYTES * _THREADS * (3 if captured else 1) if on_gpu else 0,
        logits_bytes=int(HEAD_COPIES * min(length_tokens * vocabulary * 4, HEAD_CHUNK_BYTES)) + head,
    )


def _cross_bytes(
    cross: CrossAttention,
    language: Tower,
    length_tokens: int,
    num_positions: int,
    value_bytes: int,
    num_recomputed: int | None,
) -> tuple[float, float]:
    """Bytes that layers for image features keep beside what every layer does, and bytes while one runs backward."""
    layer = num_positions * _CROSS_KEY_UNITS * language.key_value + length_tokens * _CROSS_TEXT_UNITS * language.hidden
    num_kept = 0 if num_recomputed is None else sum(number >= num_recomputed for number in cross.layers)
    gradients = _FEATURE_GRADIENTS * language.hidden + _CROSS_GRADIENT_UNITS * language.key_value
    waiting = num_kept * layer + num_positions * language.hidden
    working = num_positions * gradients + (layer if num_kept < len(cross.layers) else 0)
    return value_bytes * waiting, value_bytes * working
