"""The input embedding in the host's memory: the same rows to the last bit, the same training, and the module as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_models import make_tiny_checkpoint
from tests.support.tiny_runs import batch_of, mixed_rows, write_dataset
from tests.support.tiny_training import At, Training
from vlm.config import GenerationConfig, LoraConfig, ModelConfig, TrainingConfig
from vlm.errors import ResourceError
from vlm.generate import generate_predictions
from vlm.kernels import host_embedding as module_under_test
from vlm.kernels.host_embedding import (
    copy_on_host,
    embedding_on_host,
    host_embedding,
    host_embedding_eager,
    unpin,
    why_not,
)
from vlm.lora.attach import attached
from vlm.lora.build import build_adapter
from vlm.lora.peft_model import adapter_parameters, base_model

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_those_of_the_table(random: Callable[..., torch.Tensor], device: str, dtype: torch.dtype) -> None:
    # Rows that begin at odd addresses, that need a program and a bit, and that are one value.
    for num_words, width in ((7, 5), (1000, 64), (33, 2049), (50, 3584), (9, 1)):
        table = random(num_words, width).to(device, dtype)
        host = copy_on_host(table)
        try:
            assert host.device.type == "cpu"
            assert host.is_pinned() == (device == "cuda")
            for ids_dtype in (torch.int64, torch.int32):
                ids = torch.randint(0, num_words, (2, 11), dtype=ids_dtype, device=device)
                ids[0, 2:7] = num_words - 1
                # Every second one: ids that are not side by side.
                for own in (ids, ids[:, ::2], ids[:, :0]):
                    found = host_embedding(own, host)
                    assert found.device == own.device
                    assert torch.equal(found, host_embedding_eager(own, table))
        finally:
            unpin(host)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_on_a_gpu_beyond_32_bits_and_outside_of_the_table() -> None:
    # Of 2^31 values and a few rows, in bfloat16 4 GiB, of which only the ends are looked at.
    table = torch.zeros(2**19 + 3, 4096, device="cuda", dtype=torch.bfloat16)
    table[-3:].normal_()
    host = copy_on_host(table)
    try:
        ids = torch.tensor([2**19 + 2, 0, 2**19, 2**19 + 1], device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.set_sync_debug_mode("error")  # nobody waits
            try:
                found = host_embedding(ids, host)
                outside = host_embedding(torch.full_like(ids, -1), host)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert torch.equal(found, table[ids])
        assert outside.isnan().all()
    finally:
        unpin(host)


def test_what_the_host_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(module_under_test.mmap, "mmap", refuse)
    with pytest.raises(ResourceError, match=r"0\.0 GB of pinned memory.*no memory.*activation_memory to 'recompute'"):
        copy_on_host(torch.zeros(2, 2))


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "mllama", "idefics3"])
def test_loss_and_gradients_are_the_same(
    tiny_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    run = tiny_run(model_type)
    build_adapter(run.loaded, LoraConfig(rank=2), tmp_path)
    batch = batch_of(run.loaded, run.dataset_dir, "train", [0, 1])
    calls = []
    monkeypatch.setattr(module_under_test, "host_embedding", lambda *args: calls.append(args) or host_embedding(*args))
    with attached(run.loaded, tmp_path, trainable=True) as model:
        model.train()
        for key, parameter in adapter_parameters(model).items():
            if "lora_B" in key:
                parameter.data.fill_(0.01)

        def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
            model.zero_grad()
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            return loss.detach(), [parameter.grad.clone() for parameter in adapter_parameters(model).values()]

        base = base_model(model)
        module = base.get_input_embeddings()
        weight, names = module.weight, [name for name, _ in model.named_parameters()]
        data, address = weight.detach().clone(), weight.data_ptr()
        expected = step()
        with embedding_on_host(base) as moved:
            assert moved
            assert module.weight.shape == data.shape
            # Whoever moves parameters to a device does not come across it.
            assert all(own is not weight for own in model.parameters())
            found = step()
        assert len(calls) == 1
        # The very same numbers.
        assert torch.equal(found[0], expected[0])
        for one, other in zip(found[1], expected[1], strict=True):
            assert torch.equal(one, other)
        assert module.weight is weight is dict(module.named_parameters())["weight"]
        assert (weight.data_ptr(), [name for name, _ in model.named_parameters()]) == (address, names)
        assert torch.equal(weight, data)
        assert not {"weight", "forward"} & set(module.__dict__)
        step()
        assert len(calls) == 1
        model.eval()


class Holder(torch.nn.Module):
    """A model as far as its embedding goes."""

    def __init__(self, embedding: torch.nn.Module, head: torch.nn.Module) -> None:
        super().__init__()
        self.embedding, self.head = embedding, head
        self.requires_grad_(False)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding


def test_what_stays(tiny_run: Callable, caplog: pytest.LogCaptureFixture) -> None:
    def holder(**settings: Any) -> Holder:
        return Holder(torch.nn.Embedding(4, 3, **settings), torch.nn.Linear(3, 4, bias=False))

    assert why_not(holder(padding_idx=1)) is None
    assert "changes" in str(why_not(holder(max_norm=1.0)))
    assert "changes" in str(why_not(holder(sparse=True)))
    learns, hooked, tied, replaced = (holder() for _ in range(4))
    learns.embedding.weight.requires_grad_(True)
    assert "learns" in str(why_not(learns))
    hooked.embedding.register_forward_hook(lambda module, args, output: output * 2)
    assert "hooks" in str(why_not(hooked))
    replaced.embedding.forward = lambda ids: ids
    assert "a forward of its own" in str(why_not(replaced))
    tied.head.weight = tied.embedding.weight
    assert "another module's" in str(why_not(tied))
    with embedding_on_host(tied) as moved:
        assert not moved
        assert "stays on the device: the weight is another module's" in caplog.text
        assert "forward" not in tied.embedding.__dict__
    # Gemma multiplies what it looks up.
    assert why_not(tiny_run("gemma3").loaded.model) == "the module is a Gemma3TextScaledWordEmbedding"


def test_a_device_without_room_gets_it_back_after_the_next_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Holder(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4))
    module = model.embedding
    weight, ids = module.weight, torch.tensor([2, 0])
    expected = module(ids)

    def full(host: torch.Tensor, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(module_under_test, "_returned", full)
        with pytest.raises(KeyError), embedding_on_host(model):
            raise KeyError("the training's own error, which is not to be hidden")
    assert "stays in the host's memory" in caplog.text
    # It works as it is, and can be asked for again.
    assert torch.equal(module(ids), expected)
    assert why_not(model) is None
    with embedding_on_host(model) as moved:
        assert moved
        assert torch.equal(module(ids), expected)
    assert dict(module.named_parameters())["weight"] is weight
    assert not {"weight", "forward", module_under_test._HOME} & set(module.__dict__)


def planned_on_host(training: Training) -> Training:
    """Has a plan for the CPU do what one for a small GPU would."""
    path = training.root / "plan" / "plan.json"
    plan = json.loads(path.read_text())
    plan["activations"]["embedding_on_host"] = True
    path.write_text(json.dumps(plan))
    return training


def test_a_training_with_validation_and_answers_in_between(
    tiny_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run("qwen2_5_vl")
    settings = {"max_steps": 2, "generate_every_steps": 1, "generate_max_rows": 1, "checkpoint_every_steps": 1}
    modes: set[bool] = set()

    def watched(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        modes.add(run.loaded.model.training)
        return host_embedding(ids, weight)

    plain = Training(run, tmp_path / "plain", LoraConfig(rank=2), **settings)
    plain.start()
    monkeypatch.setattr(module_under_test, "host_embedding", watched)
    moved = planned_on_host(Training(run, tmp_path / "moved", LoraConfig(rank=2), **settings))
    moved.start()
    assert modes == {True, False}
    for key, tensor in plain.weights.items():
        assert torch.equal(moved.weights[key], tensor)
    timed = ("second", "wait", "runtime")
    for one, other in zip(moved.metrics, plain.metrics, strict=True):
        kept = [
            {key: value for key, value in line.items() if not any(word in key for word in timed)}
            for line in (one, other)
        ]
        assert kept[0] == kept[1]
    embedding = run.loaded.model.get_input_embeddings()
    assert list(embedding._parameters) == ["weight"]
    assert "forward" not in embedding.__dict__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("mode", ["offload", "recompute"])
def test_packed_training_on_a_gpu(tmp_path: Path, mode: str, quantization: str) -> None:
    """With layers offloaded, and with layers as CUDA graphs."""
    from vlm.loading.build import build_checkpoint
    from vlm.loading.checkpoint import load_checkpoint
    from vlm.training.plan import make_plan
    from vlm.training.train import train_adapter

    source = make_tiny_checkpoint("qwen2_5_vl", tmp_path / "source")
    checkpoint = tmp_path / "checkpoint"
    build_checkpoint(
        ModelConfig(name=str(source), quantization=quantization), checkpoint, device="cuda", dtype="bfloat16"
    )
    loaded = load_checkpoint(checkpoint, device="cuda")
    embedding = loaded.model.get_input_embeddings()
    before, parameter = embedding.weight.detach().clone(), embedding.weight
    rows = {"train": mixed_rows(8), "validation": mixed_rows(2), "test": mixed_rows(3)}
    dataset = write_dataset(tmp_path / "dataset", loaded.processing, rows)
    build_adapter(loaded, LoraConfig(rank=4), tmp_path / "initial")
    training = TrainingConfig(
        max_steps=3,
        batch_size=2,
        gradient_accumulation=2,
        learning_rate=5e-3,
        warmup_fraction=0,
        log_every_steps=1,
        activation_memory=mode,
        generate_every_steps=2,
        generate_max_rows=2,
    )
    losses = []
    for on_host in (True, False):
        plan_dir, out = tmp_path / f"plan-{on_host}", tmp_path / f"out-{on_host}"
        plan = make_plan(dataset, checkpoint, tmp_path / "initial", training, plan_dir, device="cuda", dtype="bfloat16")
        assert plan.activations["embedding_on_host"] == (mode == "offload")
        text = json.loads((plan_dir / "plan.json").read_text())
        text["activations"]["embedding_on_host"] = on_host
        (plan_dir / "plan.json").write_text(json.dumps(text))
        places: list[tuple[str, bool]] = []
        watch = At(1, lambda places=places: places.append((embedding.weight.device.type, embedding.weight.is_pinned())))
        train_adapter(
            loaded,
            tmp_path / "initial",
            dataset,
            plan_dir,
            training,
            out,
            work_dir=tmp_path / f"work-{on_host}",
            generation=GenerationConfig(max_new_tokens=4),
            callbacks=[watch],
        )
        assert places == [("cpu", True) if on_host else ("cuda", False)]
        lines = map(json.loads, (out / "training" / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
        assert embedding.weight is parameter
        assert parameter.is_cuda
        assert torch.equal(parameter, before)
    # The same embeddings to the last bit; attention's backward pass may add up in any order, which steps of the adapter
    # enlarge.
    assert losses[0][0] == losses[1][0]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    answers = generate_predictions(
        loaded, dataset, GenerationConfig(batch_size=2, max_new_tokens=4), tmp_path / "p", adapter_dir=out / "adapter"
    )
    assert answers.num_rows == 3
