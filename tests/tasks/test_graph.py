from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from artifacts.code_digest import code_closure
from tasks.graph import STEPS, Resolved, units_for
from vlm.config import RunConfig

PROJECT = Path(__file__).resolve().parents[2]

# Settings that no key holds as they are, each with the reason.
NOT_IN_KEYS = {
    "model.name": "its content is",
    "model.revision": "its content is",
    "model.precision": "what it resolves to is",
    "data.sources": "their content is",
    "data.distributed.num_processes": "changes no result; has a test of its own",
    "data.distributed.dask_scheduler": "changes no result; has a test of its own",
    "training.checkpoint_every_steps": "changes no result",
    "training.distributed.num_processes": "changes no result but for rounding; has a test of its own",
    "training.distributed.strategy": "needs another setting, so it has a test of its own",
    "training.distributed.num_machines": "needs another setting, so it has a test of its own",
    "training.distributed.machine_rank": "needs another setting, so it has a test of its own",
    "training.distributed.main_address": "needs another setting, so it has a test of its own",
    "training.distributed.timeout_seconds": "changes no result; has a test of its own",
    "training.generate_max_rows": "has an effect with another setting only, so it has a test of its own",
    "training.keep_best": "needs another setting, so it has a test of its own",
    "training.early_stopping_patience": "needs another setting, so it has a test of its own",
    "lora.full_finetuning": "excludes all other settings of its section, so it has a test of its own",
    "evaluation.task": "the metrics that it stands for are",
    "generation.num_processes": "changes no result but for rounding; has a test of its own",
    "generation.evaluate_base_model": "decides which units there are",
    "export.types": "decides which units there are",
    "export.destination": "a copy is no artifact",
}

OTHER_VALUES: dict[str, Any] = {
    "model.quantization": "none",
    "export.gguf_type": "f16",
    "model.keep_unquantized": ["vision"],
    "data.on_too_long": "shrink_images",
    "data.boxes.source": "normalized_1",
    "data.boxes.target": "normalized_1000",
    "data.boxes.layout": "xywh",
    "data.boxes.on_outside": "clip",
    "training.schedule": "cosine",
    "training.optimizer": "adamw",
    "training.activation_memory": "keep",
    "training.max_steps": 7,
    "training.epochs": 3.0,
    "training.learning_rate": 1e-3,
    "generation.split": "validation",
    "evaluation.metrics": ["cer"],
    "evaluation.unicode_form": "NFKC",
    "lora.rank_pattern": {"q_proj": 4},
    "data.columns.images": ["scan"],
    "lora.last_language_layers": 3,
    "lora.last_vision_layers": 3,
    "training.vision_learning_rate": 1e-5,
    "training.projector_learning_rate": 1e-5,
}


def leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def changed(name: str, value: Any) -> RunConfig:
    if name in OTHER_VALUES:
        other = OTHER_VALUES[name]
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, int):
        other = value + 20
    elif isinstance(value, float):
        other = value / 2 + 0.01
    elif isinstance(value, tuple):
        other = ["something"]
    elif value is None:
        other = 40 if any(word in name for word in ("pixels", "tokens", "rows", "steps")) else "something"
    else:
        other = f"{value} and more"
    tree: dict[str, Any] = RunConfig.model_validate(BASE).model_dump(mode="json")
    *sections, leaf = name.split(".")
    node = tree
    for section in sections:
        node = node[section]
    node[leaf] = other
    return RunConfig.model_validate(tree)


def settings_of(config: RunConfig) -> dict[str, Any]:
    resolved = Resolved(config, "cpu", "float32")
    return {unit.name: unit.settings(resolved) for unit in units_for(config) if "report" not in unit.name}


# Settings that others depend on.
BASE: dict[str, Any] = {"model": {"quantization": "nf4"}, "data": {"boxes": {"source": "absolute"}}}
CONFIG = RunConfig.model_validate(BASE | {"export": {"types": ["lora", "merged_16bit", "gguf"]}})
TRACKED = [name for name, _ in leaves(RunConfig()) if name.split(".")[0] not in ("runtime", "tracking")]


@pytest.mark.parametrize("name", [name for name in TRACKED if name not in NOT_IN_KEYS])
def test_every_setting_changes_a_key(name: str) -> None:
    config = changed(name, dict(leaves(RunConfig()))[name])
    with_exports = config.export.model_dump() | {"types": CONFIG.export.types}
    config = RunConfig.model_validate(config.model_dump() | {"export": with_exports})
    assert settings_of(config) != settings_of(CONFIG)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in NOT_IN_KEYS
        if name.startswith(("model", "data", "training")) and "test of its own" not in NOT_IN_KEYS[name]
    ],
)
def test_settings_kept_out_of_keys_change_none(name: str) -> None:
    value = {"model.precision": "float32", "data.sources": ["elsewhere.parquet"]}.get(name)
    tree: dict[str, Any] = RunConfig().model_dump(mode="json")
    section, leaf = name.split(".")
    tree[section][leaf] = value if value is not None else (17 if "steps" in name else "other")
    assert settings_of(RunConfig.model_validate(tree)) == settings_of(RunConfig())


@pytest.mark.parametrize(
    "section",
    [
        {"training": {"generate_max_rows": 7}},
        {"training": {"keep_best": "cer"}},
        {"training": {"keep_best": "cer", "early_stopping_patience": 2}},
        {"evaluation": {"ignore_case": True}},
        {"generation": {"max_new_tokens": 9}},
    ],
)
def test_rounds_of_answers_put_what_they_depend_on_into_the_key_of_the_training(section: dict[str, Any]) -> None:
    base = {"training": {"generate_every_steps": 5}}
    other = {name: base.get(name, {}) | section.get(name, {}) for name in {*base, *section}}
    assert settings_of(RunConfig.model_validate(base))["train"] != settings_of(RunConfig.model_validate(other))["train"]


def test_without_rounds_the_training_does_not_depend_on_the_evaluation() -> None:
    plain = settings_of(RunConfig())
    for section in ({"evaluation": {"ignore_case": True}}, {"generation": {"max_new_tokens": 9}}):
        assert settings_of(RunConfig.model_validate(section))["train"] == plain["train"]
    assert settings_of(RunConfig(training={"generate_max_rows": 7}))["train"] == plain["train"]
    # The task stands for its metrics, and slices are no matter of rounds.
    rounds = {"training": {"generate_every_steps": 5}}
    same = {"evaluation": {"metrics": ["cer", "wer", "exact_match"], "slice_by": ["page"]}}
    first, second = (settings_of(RunConfig.model_validate(rounds | section)) for section in ({}, same))
    assert first["train"] == second["train"]


def test_on_how_many_gpus_a_training_runs_changes_no_key_and_how_the_model_is_spread_only_its_own() -> None:
    base = settings_of(RunConfig())
    several = {"num_processes": "auto", "num_machines": 3, "machine_rank": 2, "main_address": "node0:29500"}
    for distributed in ({"num_processes": 4}, {"timeout_seconds": 99}, several):
        config = RunConfig.model_validate(
            {"training": {"distributed": distributed}, "generation": {"num_processes": 2}}
        )
        assert settings_of(config) == base
        (report,) = (unit for unit in units_for(config) if unit.name == "evaluate_and_save.report")
        resolved = Resolved(config, "cpu", "float32"), Resolved(RunConfig(), "cpu", "float32")
        assert report.settings(resolved[0]) == report.settings(resolved[1])
    spread = settings_of(
        RunConfig.model_validate({"training": {"distributed": {"num_processes": 4, "strategy": "fsdp2"}}})
    )
    assert {name for name in base if base[name] != spread[name]} == {"training_mode", "train"}


def test_who_prepares_rows_changes_no_key() -> None:
    for distributed in ({"num_processes": "auto"}, {"num_processes": 3}, {"dask_scheduler": "tcp://head:8786"}):
        config = RunConfig.model_validate({"data": {"distributed": distributed}})
        resolved = Resolved(config, "cpu", "float32"), Resolved(RunConfig(), "cpu", "float32")
        for unit, same in zip(units_for(config), units_for(RunConfig()), strict=True):
            assert unit.settings(resolved[0]) == same.settings(resolved[1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"distributed": {"num_processes": 0}}, "num_processes 0 must be at least 1, or 'auto'"),
        ({"distributed": {"num_processes": -2}}, "num_processes -2 must be at least 1, or 'auto'"),
        (
            {"distributed": {"num_processes": 2, "dask_scheduler": "tcp://a:1"}},
            "num_processes 2 has no effect with dask_",
        ),
        ({"distributed": {"dask_scheduler": "head:8786"}}, "should match pattern"),
        ({"distributed": {"num_processes": 2}, "sources": ["memory://a.jsonl"]}, "is in the memory of one process"),
        ({"distributed": {"dask_scheduler": "tcp://a:1"}, "sources": ["zip://a::memory://a.zip"]}, "or leave num_proc"),
    ],
)
def test_nonsense_about_who_prepares_rows_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({"data": data})


@pytest.mark.parametrize(
    ("distributed", "others", "message"),
    [
        ({"num_processes": 0}, {}, "num_processes 0 must be at least 1"),
        ({"num_machines": 2, "main_address": "a:1", "machine_rank": 2}, {}, "machine_rank 2 must be less than"),
        ({"num_machines": 2}, {}, "several machines need host:port"),
        ({"main_address": "a:1"}, {}, "a single one none"),
        ({"strategy": "fsdp2"}, {}, "no effect on one process"),
        (None, {"training": {"generate_every_steps": 5}}, "needs a whole model in every process"),
        (None, {"model": {"quantization": "int8"}}, "cannot be spread"),
        (None, {"lora": {"use_dora": True}}, "reads whole 4-bit weights"),
        (
            None,
            {"lora": {"full_finetuning": ["language"]}, "export": {"types": []}},
            "set training.optimizer to 'adamw'",
        ),
    ],
)
def test_contradictions_among_several_processes_are_refused(
    distributed: dict[str, Any] | None, others: dict[str, Any], message: str
) -> None:
    distributed = distributed or {"num_processes": 2, "strategy": "fsdp2"}
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(others | {"training": others.get("training", {}) | {"distributed": distributed}})


@pytest.mark.parametrize("parts", [["vision"], ["projector"], ["vision", "projector", "language"]])
def test_full_finetuning_is_in_the_key_of_the_adapter_alone(parts: list[str]) -> None:
    unquantised = {"model": {"quantization": "none"}, "export": {"types": ["merged_16bit"]}}
    base = settings_of(RunConfig.model_validate(unquantised))
    full = settings_of(RunConfig.model_validate(unquantised | {"lora": {"full_finetuning": parts}}))
    assert {name for name in base if base[name] != full[name]} == {"configure_lora"}
    assert full["configure_lora"] == {"full_finetuning": sorted(parts)}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"quantization": "nf4"}, "export": {"types": []}}, "set model.quantization to 'none'"),
        ({"export": {"types": ["lora"]}}, "makes no adapter; set export.types to"),
        ({"export": {"types": []}, "lora": {"rank": 4}}, "lora.rank would have no effect"),
        ({"export": {"types": []}, "lora": {"full_finetuning": ["vision", "vision"]}}, "names a part twice"),
    ],
)
def test_full_finetuning_refuses_what_contradicts_it(tree: dict[str, Any], message: str) -> None:
    lora = {"full_finetuning": ["vision"]} | tree.get("lora", {})
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(tree | {"lora": lora})


@pytest.mark.parametrize("tower", ["language", "vision"])
def test_last_layers_of_a_tower_that_is_off_are_refused(tower: str) -> None:
    with pytest.raises(ValidationError, match=f"last_{tower}_layers 2 has no effect"):
        RunConfig.model_validate({"lora": {f"last_{tower}_layers": 2, f"finetune_{tower}_layers": False}})


def test_learning_rate_and_rank_share_what_lies_above_them() -> None:
    base = settings_of(RunConfig())
    rate = settings_of(RunConfig(training={"learning_rate": 1e-3}))
    rank = settings_of(RunConfig(lora={"rank": 4}))
    assert {name for name in base if base[name] != rate[name]} == {"training_mode", "train"}
    assert {name for name in base if base[name] != rank[name]} == {"configure_lora"}


def test_inputs_come_from_earlier_units_and_outputs_that_exist() -> None:
    seen: dict[str, tuple[str, ...]] = {}
    for unit in units_for(CONFIG):
        assert unit.step in STEPS
        for source in unit.inputs.values():
            assert source.output in seen[source.unit]
        seen[unit.name] = unit.outputs
    assert {unit.step for unit in units_for(CONFIG)} == set(STEPS)


def test_base_predictions_do_not_depend_on_the_adapter() -> None:
    units = {unit.name: unit for unit in units_for(CONFIG)}
    assert "adapter" not in units["inference_mode.base"].inputs
    assert "adapter" in units["inference_mode.tuned"].inputs


def test_code_of_every_unit_exists() -> None:
    for unit in units_for(CONFIG):
        for module in unit.code:
            path = PROJECT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), module


@pytest.mark.parametrize(
    "name", ["load_model", "prepare_dataset", "train", "inference_mode.base", "inference_mode.tuned"]
)
def test_what_goes_through_a_processor_has_its_code_in_the_key(name: str) -> None:
    (unit,) = [unit for unit in units_for(RunConfig()) if unit.name == name]
    closure = code_closure(unit.code, cache_dir=None)
    assert {"vlm.processing.encoding", "vlm.processing.template", "vlm.families.qwen_media"} <= set(closure)


@pytest.mark.parametrize("is_there", [True, False])
def test_gguf_files_are_loaded_where_llama_cpp_is(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    monkeypatch.setattr("vlm.export.gguf.support.llama_cpp_is_there", lambda: is_there)
    units = {unit.name: unit for unit in units_for(RunConfig.model_validate({"export": {"types": ["gguf"]}}))}
    assert ("evaluate_and_save.reference" in units) == is_there
    assert ("reference" in units["evaluate_and_save.export.gguf"].inputs) == is_there
    unverified = units_for(RunConfig.model_validate({"export": {"types": ["gguf"], "verify": False}}))
    assert "evaluate_and_save.reference" not in {unit.name for unit in unverified}
