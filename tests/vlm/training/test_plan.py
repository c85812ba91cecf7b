import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.published import QWEN2_5_VL_7B
from vlm.config import LoraConfig, TrainingConfig
from vlm.data import prepared
from vlm.errors import ConfigError, DataError, ResourceError
from vlm.families import FAMILIES
from vlm.kernels.limits import HEAD_CHUNK_BYTES, HEAD_COPIES
from vlm.lora.build import build_adapter
from vlm.training import plan as plan_module
from vlm.training.activation import ActivationPlan
from vlm.training.memory import Tower
from vlm.training.plan import CUDA_CONTEXT_BYTES, PlanSummary, make_plan, read_plan


@pytest.fixture
def adapter(tiny_run: Callable, tmp_path: Path) -> Path:
    build_adapter(tiny_run("qwen2_5_vl").loaded, LoraConfig(rank=2), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_plan_on_disk(tiny_run: Callable, adapter: Path, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    training = TrainingConfig(max_steps=3, batch_size=2, gradient_accumulation=2)
    plans = [
        make_plan(
            run.dataset_dir, run.checkpoint_dir, adapter, training, tmp_path / name, device="cpu", dtype="float32"
        )
        for name in ("first", "second")
    ]
    assert plans[0] == plans[1] == read_plan(tmp_path / "first")
    for file in ("plan.json", "batches.arrow"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    plan = plans[0]
    assert (plan.num_steps, plan.num_rows_seen) == (3, 12)
    assert plan.packing
    # Twice the longest row, on a CPU.
    assert plan.max_tokens_per_pack == 2 * plan.worst_sample["num_tokens"]
    assert 3 <= plan.num_micro_batches <= 6
    assert plan.fullness == round(plan.num_tokens_seen / (plan.num_micro_batches * plan.max_tokens_per_pack), 6)
    assert plan.padding_share == 0
    assert plan.optimizer == "adamw"
    # Rows 1 and 5 have two images each, and row 5 has the longer answer.
    assert plan.worst_sample["image_sizes"] == [[56, 56], [56, 140]]
    assert plan.worst_sample["num_visual_tokens"] == 14
    assert json.loads((tmp_path / "first" / "plan.json").read_text())["device_memory_bytes"] is None


def planned(run: Any, adapter: Path, folder: Path, device: str = "cpu", **settings: Any) -> PlanSummary:
    dtype = "float32" if device == "cpu" else "bfloat16"
    training = TrainingConfig(**settings)
    return make_plan(run.dataset_dir, run.checkpoint_dir, adapter, training, folder, device=device, dtype=dtype)


def test_a_cpu_gathers_small_rows(
    tiny_run: Callable, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm.training.plan.CPU_PACK_TOKENS", 1024)
    plan = planned(tiny_run("qwen2_5_vl"), adapter, tmp_path, max_steps=3, batch_size=2, gradient_accumulation=2)
    assert (plan.max_tokens_per_pack, plan.num_micro_batches) == (1024, 3)


def test_padded_batches_where_packing_is_off(tiny_run: Callable, adapter: Path, tmp_path: Path) -> None:
    plan = planned(
        tiny_run("qwen2_5_vl"), adapter, tmp_path, packing=False, max_steps=3, batch_size=2, gradient_accumulation=2
    )
    assert (plan.num_micro_batches, plan.most_micro_batches_per_step) == (6, 2)
    assert not plan.packing
    assert plan.max_tokens_per_pack is None
    assert 0 < plan.padding_share < 1


def test_a_family_without_packing_gets_padded_batches(
    tiny_run: Callable, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpackable = dataclasses.replace(FAMILIES["qwen2_5_vl"], packing=None)
    monkeypatch.setattr(plan_module, "family_by_name", lambda name: unpackable)
    run = tiny_run("qwen2_5_vl")
    assert not planned(run, adapter, tmp_path / "a").packing
    with pytest.raises(ConfigError, match=r"tokens_per_step is 500 but Qwen2\.5-VL cannot be packed"):
        planned(run, adapter, tmp_path / "b", tokens_per_step=500)


def test_settings_of_packs_without_packing_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens_per_pack 8 has no effect without packing"):
        TrainingConfig(packing=False, max_tokens_per_pack=8)
    with pytest.raises(ValueError, match="tokens_per_step 8 has no effect without packing"):
        TrainingConfig(packing=False, tokens_per_step=8)


def test_a_row_longer_than_a_pack_is_refused_by_name(tiny_run: Callable, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_tokens_per_pack 20 is less than the \d+ tokens of 'train-5'"):
        planned(tiny_run("qwen2_5_vl"), adapter, tmp_path, max_tokens_per_pack=20)


def test_a_gpu_takes_what_its_memory_holds(
    tiny_run: Callable, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run("qwen2_5_vl")

    def plan_on(size_bytes: int) -> PlanSummary:
        monkeypatch.setattr(plan_module, "_device_memory_bytes", lambda device: size_bytes)
        settings = {"batch_size": 8, "gradient_accumulation": 1, "activation_memory": "keep"}
        return planned(run, adapter, tmp_path / str(size_bytes), device="cuda", **settings)

    large = plan_on(8_000_000_000)
    assert large.num_micro_batches == large.num_steps == 1
    assert large.max_tokens_per_pack is None
    # Of a device, a tenth stays free; the driver, what is not activations, a full chunk of the head with its copy, and what
    # graphs work in come before the packs. The rest is for half of the step.
    activations = large.memory["activations_bytes"]
    fixed = large.memory["weights_bytes"] + large.memory["adapter_bytes"] + int(HEAD_COPIES * HEAD_CHUNK_BYTES)
    fixed += large.memory["workspace_bytes"] + large.memory["pool_bytes"]
    small = plan_on(int((700_000_000 + fixed + 0.5 * activations) / 0.9))
    assert small.num_micro_batches in (2, 3)
    assert small.memory["activations_bytes"] <= 0.5 * activations


def test_weights_trained_whole_are_counted_once(tiny_run: Callable, adapter: Path, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    build_adapter(run.loaded, LoraConfig(full_finetuning=("vision", "projector", "language")), tmp_path / "full")
    plans = {
        name: make_plan(
            run.dataset_dir,
            run.checkpoint_dir,
            tmp_path / name,
            TrainingConfig(),
            tmp_path / f"plan-{name}",
            device="cpu",
            dtype="float32",
        ).memory
        for name in ("adapter", "full")
    }
    num_parameters = sum(parameter.numel() for parameter in run.loaded.model.parameters())
    # Weight, gradient and AdamW's two moments, in float32; of the stored file, only its header is left.
    assert plans["full"]["adapter_bytes"] == 16 * num_parameters
    assert plans["full"]["weights_bytes"] == plans["adapter"]["weights_bytes"] - 4 * num_parameters


def test_what_cannot_fit_is_refused_by_name(
    tiny_run: Callable, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run("qwen2_5_vl")
    monkeypatch.setattr(plan_module, "_device_memory_bytes", lambda device: 8_000_000_000)
    memory = planned(run, adapter, tmp_path / "fits", "cuda").memory
    # Room for weights and states, and for no activations.
    size_bytes = CUDA_CONTEXT_BYTES + memory["weights_bytes"] + memory["adapter_bytes"]
    monkeypatch.setattr(plan_module, "_device_memory_bytes", lambda device: size_bytes)
    with pytest.raises(
        ResourceError, match=r"costliest sample is 'train-\d'.*56 x 140 pixels.*\(1\) lower data\.max_pixels"
    ):
        planned(run, adapter, tmp_path / "p", "cuda")
    assert not (tmp_path / "p").exists()


def test_a_dataset_without_training_rows_is_refused(tiny_run: Callable, adapter: Path, tmp_path: Path) -> None:
    from tests.support.tiny_runs import mixed_rows, write_dataset

    run = tiny_run("qwen2_5_vl")
    empty = write_dataset(tmp_path / "dataset", run.loaded.processing, {"test": mixed_rows(1)})
    with pytest.raises(DataError, match="no training rows"):
        make_plan(empty, run.checkpoint_dir, adapter, TrainingConfig(), tmp_path / "p", device="cpu", dtype="float32")


def test_an_embedding_on_the_host_is_not_counted(
    tiny_run: Callable, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run("qwen2_5_vl")
    monkeypatch.setattr(plan_module, "_device_memory_bytes", lambda device: 8_000_000_000)
    moved = planned(run, adapter, tmp_path / "moved", "cuda", activation_memory="offload")
    stays = planned(run, adapter, tmp_path / "stays", "cuda", activation_memory="recompute")
    assert moved.activations["embedding_on_host"]
    assert not stays.activations["embedding_on_host"]
    weight = run.loaded.model.get_input_embeddings().weight
    assert stays.memory["weights_bytes"] - moved.memory["weights_bytes"] == weight.numel() * 2
    # Where it learns, it stays, and so it does where the head reads it, too.
    build_adapter(run.loaded, LoraConfig(rank=2, modules_to_save=("embed_tokens",)), tmp_path / "learns")
    learns = planned(run, tmp_path / "learns", tmp_path / "p", "cuda", activation_memory="offload")
    assert not learns.activations["embedding_on_host"]
    frozen = {"targets": [{"name": "model.language_model.layers.0.mlp.up_proj"}], "modules_to_save": []}
    for config, can_move in (
        ({"tie_word_embeddings": False}, True),
        ({"text_config": {"tie_word_embeddings": False}}, True),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, False),
        ({}, False),
    ):
        assert plan_module._embedding_can_move(config, frozen) is can_move
    assert not plan_module._embedding_can_move(
        {"tie_word_embeddings": False}, {**frozen, "full_finetuning": ["vision"]}
    )


def test_offloading_on_a_cpu_is_refused(tiny_run: Callable, adapter: Path, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    training = TrainingConfig(activation_memory="offload")
    with pytest.raises(ConfigError, match="'offload' needs a GPU"):
        make_plan(run.dataset_dir, run.checkpoint_dir, adapter, training, tmp_path / "p", device="cpu", dtype="float32")


PAGES = [1564, 1593, 1640, 1668, 1695, 1727, 1764, 1847]


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PlanSummary]:
    """Plans for Qwen2.5-VL-7B over eight pages a step, on cards of some memory. The checkpoint is a file of holes."""

    class Rows:
        num_tokens = np.array(PAGES)
        num_visual_tokens = np.array(PAGES) - 530
        num_supervised_tokens = np.full(len(PAGES), 480)

        def __init__(self, folder: Path, split: str) -> None:
            self.number = len(PAGES) if split == "train" else 0

        def __len__(self) -> int:
            return self.number

        def __getitem__(self, index: int) -> Any:
            return SimpleNamespace(id=str(index), images=())

    monkeypatch.setattr(prepared, "PreparedDataset", Rows)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN2_5_VL_7B | {"tie_word_embeddings": False}))
    (tmp_path / "checkpoint.json").write_text(json.dumps({"family": "qwen2_5_vl"}))
    with (tmp_path / "model" / "model.safetensors").open("wb") as file:
        file.truncate(int(5.55 * 2**30))
    targets = {
        "num_trainable_parameters": 51_521_536,
        "num_targets_by_part": {"vision": 160, "language": 196},
        "modules_to_save": [],
        "targets": [],
    }
    (tmp_path / "targets.json").write_text(json.dumps(targets))

    def plan(memory_gib: float, num_spread: int = 1, **settings: Any) -> PlanSummary:
        monkeypatch.setattr(plan_module, "_device_memory_bytes", lambda device: int(memory_gib * 2**30))
        training = TrainingConfig(batch_size=8, gradient_accumulation=1, max_steps=1, **settings)
        return make_plan(
            tmp_path,
            tmp_path,
            tmp_path,
            training,
            tmp_path / "plan",
            device="cuda",
            dtype="bfloat16",
            num_spread=num_spread,
        )

    return plan


def test_what_one_card_does_not_hold_says_what_would_help_and_fits_on_several(
    pages: Callable[..., PlanSummary], tmp_path: Path
) -> None:
    """All weights of a 7B model: 8.3 billion of 16 bytes each."""
    targets = {
        "num_trainable_parameters": 8_292_166_656,
        "num_targets_by_part": {"vision": 390, "projector": 5, "language": 338},
        "modules_to_save": [],
        "targets": [],
        "full_finetuning": ["language", "projector", "vision"],
    }
    (tmp_path / "targets.json").write_text(json.dumps(targets))
    with pytest.raises(ResourceError, match=r"132\.7 for what is trained") as failed:
        pages(80, optimizer="adamw")
    helpful = ("optimizer to 'adamw_8bit'", "lora.full_finetuning", "strategy 'fsdp2'", "larger GPU")
    assert all(remedy in str(failed.value) for remedy in helpful)
    # What no smaller image would change.
    assert "max_pixels" not in str(failed.value)
    plan = pages(80, optimizer="adamw", num_spread=4)
    assert plan.memory["reserved_bytes"] < 0.9 * 80 * 2**30
    with pytest.raises(ResourceError, match="take more or larger GPUs") as failed:
        pages(40, optimizer="adamw", num_spread=4)
    assert "adamw_8bit" not in str(failed.value)


def test_short_of_memory_packs_are_as_large_as_fit_with_inputs_on_the_host(pages: Callable[..., PlanSummary]) -> None:
    """A step's speed is that of its launches where each page is a pack of its own: 4.65 s for eight on an H200."""
    plan = pages(8)
    assert ActivationPlan(**plan.activations) == ActivationPlan(None, None, offload=True, embedding_on_host=True)
    assert plan.num_micro_batches == 4
    assert plan.memory["reserved_bytes"] < 0.9 * 8 * 2**30 - 700_000_000
    # As measured with one page to a pack; within the tenth that is promised.
    alone = pages(8, max_tokens_per_pack=max(PAGES))
    assert alone.num_micro_batches == 8
    assert alone.memory["expected_bytes"] / 2**30 == pytest.approx(5.93, rel=0.1)


def test_packs_and_graphs_grow_with_the_memory(pages: Callable[..., PlanSummary]) -> None:
    plans = {memory: pages(memory) for memory in (8, 10, 12, 24, 141)}
    activations = {memory: ActivationPlan(**plan.activations) for memory, plan in plans.items()}
    # Graphs come with memory to work in, and kept activations with what is left.
    assert [memory for memory, plan in activations.items() if plan.cuda_graphs] == [12, 24, 141]
    assert [memory for memory, plan in activations.items() if plan.offload] == [8]
    assert activations[10].recomputes_all
    assert activations[12].recomputes_all
    assert not activations[24].recomputes_all
    assert activations[141] == ActivationPlan(0, 0, cuda_graphs=True)
    numbers = [plan.num_micro_batches for plan in plans.values()]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[-1] == 1
    assert not pages(12, cuda_graphs=False).activations["cuda_graphs"]


def test_a_spread_model_leaves_room_and_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.training.device import num_local_processes
    from vlm.training.memory import kept_of_spread

    tower = Tower(num_layers=10, hidden=64, intermediate=256, key_value=64)
    in_layers = 10 * tower.layer_weights
    # Half of the layers' bytes go, two whole layers come; the rest stays.
    frozen = kept_of_spread(
        tower, 2, weights_bytes=2 * in_layers + 1000, num_trainable=50, stored_bytes=2, trains_layers=False
    )
    assert frozen == (in_layers + 1000 + 4 * tower.layer_weights, 50)
    trained = kept_of_spread(
        tower, 4, weights_bytes=1000, num_trainable=in_layers + 80, stored_bytes=2, trains_layers=True
    )
    assert trained == (1000 + 16 * tower.layer_weights, in_layers // 4 + 80)
    monkeypatch.setattr("vlm.training.device.count_gpus", lambda: 2)
    assert num_local_processes("auto", "cuda", "a.b") == 2
    assert num_local_processes("auto", "cpu", "a.b") == 1
    with pytest.raises(ResourceError, match=r"a\.b is 3 but this machine shows 2 GPUs"):
        num_local_processes(3, "cuda", "a.b")
