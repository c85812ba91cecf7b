"""Layers as CUDA graphs against the same layers launched one by one, on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device

from tests.support.packing_rows import packing_collator, packing_rows, summed_loss
from tests.support.tiny_models import make_tiny_checkpoint
from vlm.config import LoraConfig, ModelConfig
from vlm.families import FAMILIES
from vlm.kernels.install import fused
from vlm.packing.model import packed
from vlm.training.activation import ActivationPlan
from vlm.training.capture import Graph, Stack
from vlm.training.recompute import recomputed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PACKABLE = [model_type for model_type, family in FAMILIES.items() if family.packing is not None]


@pytest.mark.parametrize("kept", [True, False], ids=["keep", "recompute"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("model_type", PACKABLE)
def test_graphs_are_what_they_recorded(tmp_path: Path, model_type: str, quantization: Any, kept: bool) -> None:
    from vlm.loading.build import build_checkpoint
    from vlm.loading.checkpoint import load_checkpoint
    from vlm.lora.attach import attached
    from vlm.lora.build import build_adapter

    source = make_tiny_checkpoint(model_type, tmp_path / "source")
    config = ModelConfig(name=str(source), quantization=quantization)
    build_checkpoint(config, tmp_path / "checkpoint", device="cuda", dtype="bfloat16")
    loaded = load_checkpoint(tmp_path / "checkpoint", device="cuda")
    build_adapter(loaded, LoraConfig(rank=4, finetune_projector=True, seed=3), tmp_path / "adapter")
    rows, collator = packing_rows(loaded.processing), packing_collator(loaded)
    packs = [send_to_device(collator.pack(own), "cuda") for own in (rows, rows[:3], rows[3:], rows[1:2] * 3, rows * 6)]
    stacks = Stack(), Stack()
    plan = ActivationPlan(0, 0) if kept else ActivationPlan(None, 1)
    with attached(loaded, tmp_path / "adapter", trainable=True) as model, packed(loaded.model, loaded.family):
        model.train()
        parameters = {name: own for name, own in loaded.model.named_parameters() if own.requires_grad}
        generator = torch.Generator("cuda").manual_seed(0)
        for name, own in parameters.items():
            if "lora_B" in name:
                own.data.normal_(0, 0.1, generator=generator)

        def run(number: int) -> tuple[float, torch.Tensor]:
            with torch.autocast("cuda", torch.bfloat16):
                loss = summed_loss(model, packs[number])
                loss.backward()
            gradients = [own.grad for own in parameters.values() if own.grad is not None]
            found = torch.cat([own.flatten() for own in gradients]).clone()
            for own in parameters.values():
                own.grad = None
            return loss.item(), found

        with fused(loaded.model, loaded.family):
            with recomputed(loaded.model, loaded.family, plan):
                expected = [run(number) for number in range(len(packs))]
            with recomputed(loaded.model, loaded.family, plan, stacks=stacks):
                for number in (0, 1, 0, 4, 1, 2, 3, 0, 4, 3, 2, 4, 1, 2, 0, 3, 4):
                    loss, gradient = run(number)
                    # The same kernels over the same numbers, padded: other tilings, and atomic sums in attention. Where
                    # a router's choice turns on a rounding, a token goes another way.
                    routed = loaded.family.language_expert_parameters is not None
                    bound = 0.3 if routed else 0.02
                    assert loss == pytest.approx(expected[number][0], rel=bound / 10)
                    assert (gradient - expected[number][1]).norm() < bound * expected[number][1].norm()
        assert not any(stack.disabled for stack in stacks), [stack.reasons for stack in stacks]
        assert stacks[1].num_replays or model_type == "mllama", [stack.reasons for stack in stacks]


def test_after_a_graph_that_failed_random_numbers_are_drawn_and_another_is_recorded() -> None:
    x = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError, match="captur"):
        Graph(Stack()).capture(lambda: x.sum().item())
    assert torch.rand(3, device="cuda").unique().numel() == 3
    graph = Graph(Stack())
    graph.capture(lambda: x.mul_(3))
    graph.replay()
    assert x.tolist() == [3.0] * 4
