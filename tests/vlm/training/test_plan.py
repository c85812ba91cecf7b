import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vlm.config import LoraConfig, TrainingConfig
from vlm.errors import ConfigError, DataError, ResourceError
from vlm.families import FAMILIES
from vlm.lora.build import build_adapter
from vlm.training import plan as plan_module
from vlm.training.activation import ActivationPlan
from vlm.training.memory import Tower, estimate_memory, towers
from vlm.training.plan import make_plan, plan_batches, read_plan

LENGTHS = np.array([5, 40, 12, 33, 7, 21, 9, 30, 16, 11])


def rows_of(training: TrainingConfig, lengths: np.ndarray = LENGTHS) -> list[tuple[int, list[int]]]:
    return [(step, rows.tolist()) for step, rows in plan_batches(lengths, training)]


def test_an_epoch_sees_every_row_once() -> None:
    batches = rows_of(TrainingConfig(batch_size=2, gradient_accumulation=2))
    assert sorted(row for _, rows in batches for row in rows) == list(range(10))
    assert [len(rows) for _, rows in batches] == [2, 2, 2, 2, 2]
    assert [step for step, _ in batches] == [0, 0, 1, 1, 2]  # the last step is short


def test_epochs_follow_each_other_without_a_gap() -> None:
    batches = rows_of(TrainingConfig(epochs=2.5, batch_size=3, gradient_accumulation=1))
    stream = [row for _, rows in batches for row in rows]
    assert len(stream) == 25
    assert set(Counter(stream).values()) == {2, 3}
    assert [len(rows) for _, rows in batches] == [3] * 8 + [1]


def test_max_steps_fill_every_step() -> None:
    batches = rows_of(TrainingConfig(max_steps=7, batch_size=2, gradient_accumulation=3))
    assert Counter(step for step, _ in batches) == dict.fromkeys(range(7), 3)
    assert all(len(rows) == 2 for _, rows in batches)


def test_rows_of_a_step_do_not_depend_on_its_cut_into_micro_batches() -> None:
    cuts = [(1, 8), (2, 4), (8, 1)]
    steps = []
    for batch_size, accumulation in cuts:
        rows: dict[int, list[int]] = {}
        for step, batch in rows_of(TrainingConfig(epochs=3, batch_size=batch_size, gradient_accumulation=accumulation)):
            rows.setdefault(step, []).extend(batch)
        steps.append({step: sorted(batch) for step, batch in rows.items()})
    assert steps[0] == steps[1] == steps[2]


def test_within_a_step_rows_go_by_length() -> None:
    for _, rows in rows_of(TrainingConfig(epochs=4, batch_size=10, gradient_accumulation=1)):
        assert LENGTHS[rows].tolist() == sorted(LENGTHS[rows].tolist(), reverse=True)


def test_the_seed_decides_the_order() -> None:
    assert rows_of(TrainingConfig(seed=1)) == rows_of(TrainingConfig(seed=1))
    assert rows_of(TrainingConfig(seed=1)) != rows_of(TrainingConfig(seed=2))


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
    assert (plan.num_steps, plan.num_micro_batches, plan.num_rows_seen) == (3, 6, 12)
    assert plan.optimizer == "adamw"
    # Rows 1 and 5 have two images each, and row 5 has the longer answer.
    assert plan.worst_sample["image_sizes"] == [[56, 56], [56, 140]]
    assert plan.worst_sample["num_visual_tokens"] == 14
    assert 0 <= plan.padding_share < 1
    assert json.loads((tmp_path / "first" / "plan.json").read_text())["device_memory_bytes"] is None


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
    monkeypatch.setattr(plan_module, "_device_memory_bytes", lambda device: 600_000_000)
    with pytest.raises(
        ResourceError, match=r"costliest sample is 'train-\d'.*56 x 140 pixels.*\(1\) lower training.batch_size"
    ):
        make_plan(
            run.dataset_dir,
            run.checkpoint_dir,
            adapter,
            TrainingConfig(),
            tmp_path / "p",
            device="cuda",
            dtype="bfloat16",
        )
    assert not (tmp_path / "p").exists()


def test_a_dataset_without_training_rows_is_refused(tiny_run: Callable, adapter: Path, tmp_path: Path) -> None:
    from tests.support.tiny_runs import mixed_rows, write_dataset

    run = tiny_run("qwen2_5_vl")
    empty = write_dataset(tmp_path / "dataset", run.loaded.processing, {"test": mixed_rows(1)})
    with pytest.raises(DataError, match="no training rows"):
        make_plan(empty, run.checkpoint_dir, adapter, TrainingConfig(), tmp_path / "p", device="cpu", dtype="float32")


QWEN2_5_VL_7B = {
    "text_config": {
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "spatial_merge_size": 2},
}


QWEN = FAMILIES["qwen2_5_vl"]


@pytest.mark.parametrize(
    ("activations", "measured_gib"), [(ActivationPlan(None, None), 13.5), (ActivationPlan(0, 0), 112)]
)
def test_estimate_against_a_measurement(activations: ActivationPlan, measured_gib: float) -> None:
    # One row of 12,288 tokens, no images, on an H200, nothing fused; NF4 weights and 16-bit embeddings take about 5.6 GB.
    estimate = estimate_memory(
        QWEN2_5_VL_7B,
        QWEN,
        weights_bytes=5_600_000_000,
        num_trainable=40_000_000,
        trains_vision=True,
        length_tokens=12_288,
        num_visual_tokens=0,
        value_bytes=2,
        activations=activations,
        fused=False,
        optimizer="adamw_8bit",
    )
    assert estimate.expected_bytes / 2**30 == pytest.approx(measured_gib, rel=0.15)
    assert estimate.at_least_bytes / 2**30 < measured_gib


def test_widths_of_both_vision_configurations() -> None:
    language, vision, patches = towers(QWEN2_5_VL_7B, QWEN)
    assert language == Tower(28, 3584, 18944, 512, gated=True, joint=False)
    assert vision == Tower(32, 1280, 3420, 1280, gated=True, joint=True)
    assert patches == 4
    qwen2_vl = {
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "spatial_merge_size": 2}
    }
    vision = towers(QWEN2_5_VL_7B | qwen2_vl, FAMILIES["qwen2_vl"])[1]
    assert vision == Tower(32, 1280, 5120, 1280, gated=False, joint=True)


def test_widths_of_towers_with_a_second_encoder_or_a_merging_projector() -> None:
    text = {"num_hidden_layers": 40, "hidden_size": 4096, "intermediate_size": 14336}
    vision = {"num_hidden_layers": 32, "num_global_layers": 8, "hidden_size": 1280, "intermediate_size": 5120}
    found = towers({"text_config": text, "vision_config": vision}, FAMILIES["mllama"])[1:]
    assert found == (Tower(40, 1280, 5120, 1280, gated=False), 1)
    vision = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096}
    mistral3 = {"text_config": text, "vision_config": vision, "spatial_merge_size": 2}
    assert towers(mistral3, FAMILIES["mistral3"])[1:] == (Tower(24, 1024, 4096, 1024), 4)


def test_an_image_behind_one_token_costs_what_its_tiles_cost(tiny_run: Callable, tmp_path: Path) -> None:
    memory = {}
    for model_type in ("mllama", "qwen2_vl"):
        run = tiny_run(model_type)
        folder = tmp_path / model_type
        build_adapter(run.loaded, LoraConfig(rank=2), folder)
        settings = TrainingConfig(batch_size=1, max_steps=8, gradient_accumulation=1)
        memory[model_type] = make_plan(
            run.dataset_dir, run.checkpoint_dir, folder, settings, folder / "plan", device="cpu", dtype="float32"
        ).memory["activations_bytes"]
    # Two images: 2 * 4 tiles * 24 positions against the 14 * 4 patches of the other family.
    assert memory["mllama"] > 1.5 * memory["qwen2_vl"]


def test_a_frozen_tower_costs_one_layer_and_no_graph() -> None:
    tower = Tower(10, 64, 128, 64)
    frozen = tower.activation_bytes(100, 2, num_recomputed=0, trained=False)
    assert 10 * frozen < tower.activation_bytes(100, 2, num_recomputed=0) < 11 * frozen


def test_the_first_of_two_encoders_sees_every_patch() -> None:
    """DeepSeek-OCR: 64 x 64 patches of a page become 16 x 16 tokens."""
    sam = {"num_hidden_layers": 12, "hidden_size": 768, "mlp_dim": 3072, "downsample_channels": [512, 1024]}
    vision = {"sam_config": sam, "encoder_config": {"num_hidden_layers": 24, "hidden_size": 1024}}
    found = towers(QWEN2_5_VL_7B | {"vision_config": vision}, FAMILIES["deepseek_ocr"])[1:]
    assert found == (Tower(12, 768, 3072, 768, gated=False, joint=True), 16)


def test_offloading_on_a_cpu_is_refused(tiny_run: Callable, adapter: Path, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    training = TrainingConfig(activation_memory="offload")
    with pytest.raises(ConfigError, match="'offload' needs a GPU"):
        make_plan(run.dataset_dir, run.checkpoint_dir, adapter, training, tmp_path / "p", device="cpu", dtype="float32")
