"""A model spread over a single process, against the same model as it is: what is put together, and what is let go of."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.tiny_runs import batch_of
from tests.support.tiny_training import ALL_PARTS
from tests.vlm.conftest import TinyRun
from vlm.families import FAMILIES
from vlm.loading.checkpoint import LoadedModel, load_checkpoint
from vlm.lora.attach import attach_adapter
from vlm.lora.build import build_adapter
from vlm.lora.peft_model import adapter_parameters
from vlm.training.distributed.ranks import is_spread
from vlm.training.distributed.sharding import LocalShards, Sharded, whole_tensor


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Any]:
    """The only process of its group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield SimpleNamespace(rank=0, size=1)
    dist.destroy_process_group()


def in_bfloat16(run: TinyRun, device: str) -> LoadedModel:
    loaded = load_checkpoint(run.checkpoint_dir, device="cpu")
    loaded.model.to(torch.bfloat16)
    return dataclasses.replace(loaded, device=device)


def gradients(run: TinyRun, model: Any) -> dict[str, torch.Tensor]:
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0])
    labels = batch.pop("labels")[0, 1:]
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        logits = model(**batch, use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits.float(), labels).backward()
    return {
        name: whole_tensor(parameter.grad).clone()
        for name, parameter in adapter_parameters(model).items()
        if parameter.grad is not None
    }


# Of logits, which nobody changes in place; a training gets a loss.
@pytest.mark.filterwarnings("ignore:.*returned a view tensor:UserWarning")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_spread_weights_in_bfloat16_give_the_gradients_of_autocast(
    tiny_run: Callable, tmp_path: Path, alone: Any, model_type: str
) -> None:
    run = tiny_run(model_type)
    build_adapter(run.loaded, ALL_PARTS, tmp_path / "initial")
    expected = gradients(run, attach_adapter(in_bfloat16(run, "cpu"), tmp_path / "initial", trainable=True))
    # On its way from the host's memory to a GPU, which is a CPU here.
    waiting = in_bfloat16(run, "cuda")
    model = attach_adapter(waiting, tmp_path / "initial", trainable=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    Sharded(model, waiting.family, "cpu", "bfloat16", alone)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    spread = {name for name, parameter in model.named_parameters() if is_spread(parameter)}
    assert spread
    # What is small stays whole, and so in float32.
    assert all(parameter.ndim > 1 for name, parameter in model.named_parameters() if name in spread)
    found = gradients(run, model)
    assert set(found) == set(expected)
    assert spread & set(found)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(
            tensor, expected[name], atol=0, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_no_gradient_of_a_slice_outlives_its_step(tiny_run: Callable, tmp_path: Path, alone: Any) -> None:
    run = tiny_run("qwen2_5_vl")
    build_adapter(run.loaded, ALL_PARTS, tmp_path / "initial")
    loaded = load_checkpoint(run.checkpoint_dir, device="cpu")
    model = attach_adapter(loaded, tmp_path / "initial", trainable=True)
    sharded = Sharded(model, loaded.family, "cpu", "float32", alone)
    optimizer = torch.optim.AdamW(model.parameters())
    shards = LocalShards(optimizer, sharded, alone)
    gradients(run, model)
    shards.take()
    held = [
        weakref.ref(place.grad.untyped_storage())
        for parameter, place in shards.places.items()
        if is_spread(parameter) and place.grad is not None
    ]
    assert held
    optimizer.step()
    # As the trainer does after a step.
    for parameter in model.parameters():
        parameter.grad = None
    assert not [storage for storage in held if storage() is not None]
    assert all(place.grad is None for place in shards.places.values())
