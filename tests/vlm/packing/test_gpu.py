"""Packed rows in bfloat16 through the kernel for segments, against float32 one by one."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device

from tests.support.packing_rows import packing_collator, packing_rows, summed_loss
from tests.support.tiny_models import make_tiny_checkpoint
from vlm.config import LoraConfig, ModelConfig
from vlm.families import FAMILIES
from vlm.packing import attention
from vlm.packing.attention import Segments, attend, ends_of
from vlm.packing.model import packed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PACKABLE = [model_type for model_type, family in FAMILIES.items() if family.packing is not None]


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    kernel = attention._varlen

    def counted(*args: Any) -> torch.Tensor:
        calls.append(1)
        return kernel(*args)

    monkeypatch.setattr(attention, "_varlen", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "head"), [(4, 2, 32), (4, 4, 80), (8, 1, 128)])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 5)])
def test_kernel_against_segments_in_float64(
    kernel_calls: list[int],
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    head: int,
    causal: bool,
    window: int | None,
) -> None:
    lengths = [64, 64, 3, 130, 1, 17]
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, sum(lengths)), (key_heads, sum(lengths)), (key_heads, sum(lengths)))
    inputs = [torch.randn(1, *shape, head, generator=generator).to("cuda", dtype).requires_grad_() for shape in shapes]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    segments = Segments(ends_of(lengths, "cuda"), lengths)
    found = attend(*inputs, segments, causal=causal, window=window)
    expected = attend(*doubles, segments, causal=causal, window=window)
    assert len(kernel_calls) == 1
    weight = torch.randn(found.shape, generator=generator).cuda()
    (found.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    # One rounding of 2^-9 (2^-12 in float16) of probabilities, output and gradients each, and sums of them.
    bound = 0.02 if dtype == torch.bfloat16 else 0.004
    pairs = [(found, expected), *((own.grad, other.grad) for own, other in zip(inputs, doubles, strict=True))]
    for own, other in pairs:
        assert (own - other).norm() < bound * other.norm()


def test_cross_attention_through_the_kernel(kernel_calls: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 9), (2, 40), (2, 40))
    inputs = [torch.randn(1, *shape, 32, generator=generator).to("cuda", torch.bfloat16) for shape in shapes]
    lengths_q, lengths_k = [2, 3], [30, 20]
    segments = Segments(
        ends_of(lengths_q, "cuda"),
        lengths_q,
        ends_of(lengths_k, "cuda"),
        lengths_k,
        causal=False,
        queries=torch.tensor([0, 1, 4, 5, 8], device="cuda"),
        keys=torch.arange(50, device="cuda") % 40,
    )
    found = attend(*inputs, segments)
    expected = attend(*(tensor.double() for tensor in inputs), segments)
    assert len(kernel_calls) == 1
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert found[0, [2, 3, 6, 7]].abs().max() == 0


def loaded_on_gpu(model_type: str, folder: Path) -> Any:
    from vlm.loading.build import build_checkpoint
    from vlm.loading.checkpoint import load_checkpoint

    source = make_tiny_checkpoint(model_type, folder / "source")
    config = ModelConfig(name=str(source), quantization="none")
    build_checkpoint(config, folder / "checkpoint", device="cuda", dtype="bfloat16")
    return load_checkpoint(folder / "checkpoint", device="cuda")


@pytest.mark.parametrize("model_type", PACKABLE)
def test_packed_in_bfloat16(tmp_path: Path, kernel_calls: list[int], model_type: str) -> None:
    from vlm.lora.attach import attached
    from vlm.lora.build import build_adapter

    loaded = loaded_on_gpu(model_type, tmp_path)
    # The same adapter on the same rounded weights, in float32.
    exact = copy.copy(loaded)
    object.__setattr__(exact, "model", copy.deepcopy(loaded.model).float())
    build_adapter(loaded, LoraConfig(rank=4, finetune_projector=True, seed=3), tmp_path / "adapter")
    _fill(tmp_path / "adapter")
    rows = packing_rows(loaded.processing)
    collator = packing_collator(loaded)

    def run(which: Any, pack: bool) -> tuple[float, torch.Tensor]:
        """Summed loss, and all gradients as one vector."""
        with attached(which, tmp_path / "adapter", trainable=True) as model:
            model.train()
            low = which is loaded
            with packed(which.model, which.family), torch.autocast("cuda", torch.bfloat16, enabled=low):
                batches = [collator.pack(rows)] if pack else [collator([row]) for row in rows]
                losses = torch.stack([summed_loss(model, send_to_device(batch, "cuda")) for batch in batches])
                losses.sum().backward()
            named = sorted((name, own) for name, own in which.model.named_parameters() if own.requires_grad)
            return losses.sum().item(), torch.cat([own.grad.flatten() for _, own in named])

    loss, gradient = run(exact, False)
    # In float32 segments go one by one on a GPU, too.
    same_loss, same_gradient = run(exact, True)
    assert not kernel_calls
    assert same_loss == pytest.approx(loss, rel=1e-4)
    assert (same_gradient - gradient).norm() < 1e-3 * gradient.norm()
    alone, packs = run(loaded, False), run(loaded, True)
    assert kernel_calls
    # bfloat16 has 8 bits: each of a dozen layers rounds by up to 2^-9, forward and backward. Where a router's choice
    # turns on such a rounding, a token takes another way altogether.
    routed = loaded.family.language_expert_parameters is not None
    loss_bound, gradient_bound = (0.05, 0.6) if routed else (0.01, 0.15)
    for found_loss, found_gradient in (alone, packs):
        assert found_loss == pytest.approx(loss, rel=loss_bound)
        assert (found_gradient - gradient).norm() < gradient_bound * gradient.norm()


@pytest.mark.parametrize("model_type", PACKABLE)
def test_a_spoilt_neighbour_changes_no_bit_of_the_kernel(tmp_path: Path, model_type: str) -> None:
    loaded = loaded_on_gpu(model_type, tmp_path)
    if loaded.family.language_expert_parameters is not None:
        pytest.skip("how many tokens an expert sees decides the order of sums")
    batch = send_to_device(packing_collator(loaded).pack(packing_rows(loaded.processing)), "cuda")
    del batch["labels"]
    lengths = batch["packed_row"]["lengths"]
    embeddings = loaded.model.get_input_embeddings()

    def spoil(poison: float) -> Callable[..., torch.Tensor]:
        return lambda module, inputs, output: output.index_fill(1, torch.arange(lengths[0], device="cuda"), poison)

    with packed(loaded.model, loaded.family), torch.no_grad():
        clean = loaded.model(**batch).logits[0].split(lengths)
        for poison in (torch.nan, 1e30):
            # All text of the first conversation.
            handle = embeddings.register_forward_hook(spoil(poison))
            spoilt = loaded.model(**batch).logits[0].split(lengths)
            handle.remove()
            assert not torch.equal(spoilt[0], clean[0])
            for found, expected in zip(spoilt[1:], clean[1:], strict=True):
                assert torch.equal(found, expected)


def _fill(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, tensor in sorted(tensors.items()):
        if "lora_B" in key:
            tensor.normal_(0, 0.1, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
