from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.evaluate import evaluate
from flows.evaluate_cli import main, parse
from tasks.evaluation_runs import EvaluationRuns
from tasks.plan import HIT
from tasks.session import Session
from vlm.config import EvaluateConfig, RunConfig
from vlm.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def config_for(settings: dict[str, Any], path: Path | str, **subject: Any) -> EvaluateConfig:
    sections = {name: value for name, value in settings.items() if name not in ("lora", "training", "export")}
    return EvaluateConfig.model_validate(sections | {"subject": {"path": str(path), **subject}})


def ran(summary: dict[str, Any]) -> set[str]:
    return {unit for step in summary["steps"].values() for unit in step["ran"]}


def predictions_of(first_run: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    store = Session.open(RunConfig.model_validate(settings)).store
    text = store.read_text(first_run["artifacts"]["inference_mode.tuned.predictions"], "predictions.jsonl")
    return [json.loads(line) for line in text.splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_exported_adapter_costs_nothing_that_the_training_paid_for(
    first_run: dict[str, Any], small_settings: dict[str, Any]
) -> None:
    config = config_for(small_settings, first_run["locations"]["adapter"])
    summary = evaluate(config)
    # The export holds the adapter's own files: the same artifact, so even its answers are there.
    assert ran(summary) == {"import_subject.adapter", "evaluate_and_save.report"}
    assert summary["metrics"] == first_run["metrics"]
    name = "evaluate_and_save.metrics.metrics"
    assert summary["artifacts"][name] == first_run["artifacts"][name]
    page = Path(summary["locations"]["evaluation"]).read_text()
    assert "evaluation report" in page
    assert "data:image/" in page
    assert ran(evaluate(config)) == set()
    assert all(entry.status == HIT for entry in EvaluationRuns.open(config).plan())


def test_answers_from_a_file_score_as_if_generated_here(
    first_run: dict[str, Any], small_settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = predictions_of(first_run, small_settings)
    few = [{name: row[name] for name in ("id", "prediction", "finish_reason")} for row in reversed(rows)]
    summary = evaluate(config_for(small_settings, write_rows(tmp_path / "answers.jsonl", few)))
    assert "inference_mode.base" not in ran(summary)
    assert summary["metrics"]["metrics"] == first_run["metrics"]["metrics"]
    alone = config_for(small_settings, write_rows(tmp_path / "alone.jsonl", rows), targets="file")
    summary = evaluate(alone)
    assert set(summary["steps"]) == {"import_subject", "evaluate_and_save"}
    for name, entry in summary["metrics"]["metrics"].items():
        assert entry["tuned"] == first_run["metrics"]["metrics"][name]["tuned"]
        assert entry["base"] is None


def test_a_whole_model_is_compared_with_the_base_model(
    first_run: dict[str, Any], small_settings: dict[str, Any], tmp_path: Path
) -> None:
    from vlm.builtin import make_builtin_checkpoint

    # The base model itself as a folder: its answers, and so every figure, must be those of the base model.
    folder = make_builtin_checkpoint(tmp_path / "whole")
    summary = evaluate(config_for(small_settings, folder))
    assert "load_model" in ran(summary)
    assert summary["subject"] == {"kind": "model", "name": "whole"}
    for name, entry in summary["metrics"]["metrics"].items():
        assert entry["tuned"] == entry["base"] == first_run["metrics"]["metrics"][name]["base"]
        assert entry["difference"]["value"] == 0


@pytest.mark.parametrize(("kind", "quantization"), [("merged_4bit", "nf4"), ("merged_8bit", "int8")])
def test_a_quantised_export_answers_as_the_merged_model_quantised(
    first_run: dict[str, Any], small_settings: dict[str, Any], tmp_path: Path, kind: Any, quantization: Any
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from vlm.config import GenerationConfig, ModelConfig
    from vlm.export import export
    from vlm.generate import generate_predictions
    from vlm.loading.build import build_checkpoint
    from vlm.loading.checkpoint import load_checkpoint

    store = Session.open(RunConfig.model_validate(small_settings)).store
    made = {name: store.materialize(digest) for name, digest in first_run["artifacts"].items()}
    checkpoint, adapter = made["load_model.checkpoint"], tmp_path / "adapter"
    shutil.copytree(made["train.adapter"], adapter, copy_function=shutil.copyfile)
    # As if trained far enough to change answers.
    tensors = load_file(adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in sorted(tensors):
        if "lora_B" in name:
            tensors[name].normal_(0, 0.1, generator=generator)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    for own in (kind, "merged_16bit"):
        export(own, checkpoint, adapter, tmp_path / own, max_shard_size_mb=1000, device="cpu")

    generation = {"max_new_tokens": 6, "max_rows": 3}

    def answers(folder: Path) -> list[str]:
        loaded, output = load_checkpoint(folder, device="cpu"), tmp_path / "answers"
        generate_predictions(loaded, made["prepare_dataset.dataset"], GenerationConfig(**generation), output)
        return predictions((output / "predictions.jsonl").read_text())

    def predictions(lines: str) -> list[str]:
        return [json.loads(line)["prediction"] for line in lines.splitlines()]

    summary = evaluate(config_for(small_settings | {"generation": generation}, tmp_path / kind))
    assert summary["subject"] == {"kind": "model", "name": kind}
    (digest,) = (ref for name, ref in summary["artifacts"].items() if name.endswith(".predictions"))
    found = predictions(store.read_text(digest, "predictions.jsonl"))
    # The 16-bit export, quantised by transformers while it is loaded, has the same weights to the last bit, and so gives
    # the same answers, which are not those of the untrained model.
    model = ModelConfig(name=str(tmp_path / "merged_16bit"), quantization=quantization)
    build_checkpoint(model, tmp_path / "quantised", device="cpu", dtype="float32")
    assert found == answers(tmp_path / "quantised")
    assert found != answers(checkpoint)


def test_the_file_of_a_training_run_serves(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training: {epochs: 2}\nlora: {rank: 8}\nexport: {types: []}\nevaluation: {metrics: [wer]}\n")
    config, _ = parse(["--config", str(file), "--subject.path", "x", "--generation.max_rows", "3"])
    assert config.evaluation.metrics == ("wer",)
    assert config.generation.max_rows == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "subject is missing: give --subject.path"),
        (["--subject.path", "x", "--subject.kind", "adapter", "--subject.targets", "file"], "drop one of the two"),
    ],
)
def test_wrong_settings_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse(arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "does not exist"),
        ("model.gguf", "", "llama.cpp runs"),
        ("notes.txt", "", "is no adapter, model or predictions"),
        ("a.jsonl", "{", "line 1 is no JSON"),
        ("a.jsonl", "[]", "line 1 is a list"),
        ("a.jsonl", '{"id": "1"}', "has no 'prediction'"),
        ("a.jsonl", '{"id": "1", "prediction": 3}', "it must be text"),
        ("adapter_model.safetensors/..", None, "does not exist"),
    ],
)
def test_an_unusable_subject_is_one_line(
    name: str, content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    path = tmp_path / name
    assert main(["--subject.path", str(path), "--runtime.store", str(tmp_path / "store")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_an_adapter_without_its_config_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert main(["--subject.path", str(tmp_path)]) == 2
    assert "has no adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("evaluate_cli", ["--help"]),
        ("evaluate_cli", ["--subject.path", "{folder}/a.jsonl", "--plan", "--runtime.store", "{folder}/store"]),
        ("compare", ["--help"]),
        ("promote", ["--help"]),
    ],
)
def test_help_and_plan_import_nothing_heavy(module: str, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "1", "prediction": "x"}\n')
    words = [word.replace("{folder}", str(tmp_path)) for word in arguments]
    script = (
        f"import sys\nfrom flows.{module} import main\n"
        f"try:\n    status = main({words!r})\nexcept SystemExit as end:\n    status = end.code\n"
        "heavy = {'torch', 'transformers', 'prefect', 'mlflow', 'trl', 'peft', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\nraise SystemExit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout or "import_subject" in done.stdout
