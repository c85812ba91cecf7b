from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.vision_finetune import vision_finetune
from tasks.graph import STEPS
from tasks.plan import FORCED, HIT, MISS, PENDING, Planned, plan_run
from tasks.session import Session
from tasks.summary import format_summary
from tasks.tracking import Tracker
from tests.flows.conftest import settings_on
from vlm.config import RunConfig
from vlm.errors import ExportError
from vlm.export.gguf.support import llama_cpp_is_there

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _prefect(prefect_server: None) -> None:
    """Every run here talks to the test's server."""


def merged(settings: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(settings | {name: settings.get(name, {}) | part for name, part in sections.items()})


def ran(summary: dict[str, Any]) -> set[str]:
    return {unit for step in summary["steps"].values() for unit in step["ran"]}


def planned(config: RunConfig, rerun_from: str | None = None) -> dict[str, Planned]:
    return {entry.unit: entry for entry in plan_run(Session.open(config, rerun_from=rerun_from))}


def test_all_seven_steps_run(first_run: dict[str, Any], small_settings: dict[str, Any]) -> None:
    assert tuple(first_run["steps"]) == STEPS
    assert all(step["ran"] for step in first_run["steps"].values())
    metrics = first_run["metrics"]["metrics"]
    assert set(metrics) == {"cer", "wer", "exact_match"}
    assert metrics["cer"]["tuned"]["value"] >= 0
    assert first_run["metrics"]["num_rows"] == 4
    adapter = Path(first_run["locations"]["adapter"])
    assert (adapter / "adapter_model.safetensors").exists()
    page = Path(first_run["locations"]["report"]).read_text()
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    lines = format_summary(first_run).splitlines()
    assert len(lines) < 24
    assert any(line.startswith("metric   cer") for line in lines)


def test_full_finetuning_runs_through(first_run: dict[str, Any], small_settings: dict[str, Any]) -> None:
    full = {
        "lora": {"full_finetuning": ["projector", "language"], "rank": 16},
        "export": {"types": ["merged_16bit"], "verify": False},
    }
    config = RunConfig.model_validate(small_settings | full)
    summary = vision_finetune(config)
    assert "prepare_dataset" not in ran(summary)
    assert {"configure_lora", "train", "inference_mode.tuned", "evaluate_and_save.export.merged_16bit"} <= ran(summary)
    names = {path.name for path in Path(summary["locations"]["adapter"]).iterdir()}
    assert names == {"adapter_model.safetensors", "targets.json"}
    assert ran(vision_finetune(config)) == set()


def test_a_rerun_does_nothing(first_run: dict[str, Any], small_settings: dict[str, Any]) -> None:
    again = vision_finetune(RunConfig.model_validate(small_settings))
    assert ran(again) == set()
    assert again["artifacts"] == first_run["artifacts"]
    assert again["metrics"] == first_run["metrics"]
    assert all(entry.status == HIT for entry in planned(RunConfig.model_validate(small_settings)).values())


def test_cached_steps_show_as_cached(first_run: dict[str, Any], small_settings: dict[str, Any]) -> None:
    state = vision_finetune(RunConfig.model_validate(small_settings), return_state=True)
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        )
    assert {run.name.rsplit("-", 1)[0] for run in runs} == set(STEPS)
    assert {run.state_name for run in runs} == {"Cached"}


def test_another_learning_rate_shares_what_lies_above(
    first_run: dict[str, Any], small_settings: dict[str, Any]
) -> None:
    config = merged(small_settings, training={"learning_rate": 1e-3})
    plan = planned(config)
    assert {name for name, entry in plan.items() if entry.status == HIT} == {
        "load_model",
        "configure_lora",
        "prepare_dataset",
        "inference_mode.base",
    }
    assert plan["training_mode"].status == MISS
    assert any("config.learning_rate" in reason and "0.001" in reason for reason in plan["training_mode"].reasons)
    assert plan["train"].status == PENDING
    summary = vision_finetune(config)
    assert "train" in ran(summary)
    assert not {"load_model", "configure_lora", "prepare_dataset", "inference_mode.base"} & ran(summary)
    assert summary["artifacts"]["train.adapter"] != first_run["artifacts"]["train.adapter"]


def test_answers_during_training_are_logged_and_the_best_adapter_is_kept(
    first_run: dict[str, Any], small_settings: dict[str, Any]
) -> None:
    rounds = {"generate_every_steps": 1, "generate_max_rows": 2, "keep_best": "cer", "early_stopping_patience": 3}
    held_out = {"split": {"validation_fraction": 0.2}}  # of so few rows, the default leaves none
    config = merged(small_settings, data=held_out, training=rounds, evaluation={"metrics": ["anls"]})
    summary = vision_finetune(config)
    assert {"train", "inference_mode.tuned", "evaluate_and_save.metrics"} <= ran(summary)
    assert set(summary["metrics"]["metrics"]) == {"anls"}
    store = Path(small_settings["runtime"]["store"])
    assert {1, 2, 3} <= set(logged_steps(store.parent / "mlflow.db", "generated_cer"))
    assert ran(vision_finetune(config)) == set()


def test_a_second_export_repeats_nothing_else(first_run: dict[str, Any], small_settings: dict[str, Any]) -> None:
    summary = vision_finetune(merged(small_settings, export={"types": ["lora", "merged_4bit"]}))
    assert ran(summary) == {"evaluate_and_save.export.merged_4bit"}
    assert (Path(summary["locations"]["merged_4bit"]) / "config.json").exists()


def test_another_slice_exports_nothing_again(first_run: dict[str, Any], small_settings: dict[str, Any]) -> None:
    summary = vision_finetune(merged(small_settings, evaluation={"slice_by": ["group"]}))
    assert ran(summary) == {"evaluate_and_save.metrics", "evaluate_and_save.report"}
    other = {name for name, digest in summary["artifacts"].items() if first_run["artifacts"][name] != digest}
    assert other == {"evaluate_and_save.metrics.metrics", "evaluate_and_save.report.report"}


def test_exports_are_verified_in_a_fresh_process(first_run: dict[str, Any], small_settings: dict[str, Any]) -> None:
    config = merged(small_settings, export={"types": ["merged_16bit", "gguf"], "verify": True, "verify_rows": 2})
    summary = vision_finetune(config)
    unit = "evaluate_and_save"
    assert ran(summary) == {f"{unit}.reference", f"{unit}.export.merged_16bit", f"{unit}.export.gguf"}
    folder = Path(summary["locations"]["merged_16bit"])
    verification = json.loads((folder / "verification.json").read_text())
    assert verification["num_rows"] == 2
    assert verification["distance"] < verification["max_distance"]
    card = (folder / "README.md").read_text()
    assert "Loaded again in a fresh process" in card
    figure = summary["metrics"]["metrics"]["cer"]["tuned"]["value"]
    assert f"| Character error rate (lower is better) | {figure:.4f} [" in card
    folder = Path(summary["locations"]["gguf"])
    assert "PARAMETER num_ctx 4096" in (folder / "Modelfile").read_text()  # short conversations, and the least is that
    says = "with llama.cpp and compared" if llama_cpp_is_there() else "llama.cpp itself did not run the files"
    assert says in (folder / "README.md").read_text()
    assert ran(vision_finetune(config)) == set()


def test_a_model_that_cannot_be_exported_as_asked_is_refused_first(tmp_path: Path) -> None:
    from tests.support.tiny_models import make_tiny_checkpoint

    model = make_tiny_checkpoint("mllama", tmp_path / "model")
    settings = ["--model.name", str(model), "--export.types", "gguf", "--runtime.store", str(tmp_path / "store")]
    done = run_command(*settings, cwd=tmp_path)
    assert done.returncode == 2
    assert "Llama 3.2 Vision cannot be written for llama.cpp" in done.stderr
    assert not list((tmp_path / "store").glob("objects/*/*"))


def test_what_the_model_says_of_its_exports_counts_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.cli import main
    from tests.support.tiny_models import make_tiny_checkpoint

    # Of a family that llama.cpp runs, but with other windows.
    model = make_tiny_checkpoint("qwen2_5_vl", tmp_path / "model")
    settings = ["--model.name", str(model), "--runtime.store", str(tmp_path / "store"), "--tracking.enabled", "false"]
    assert main([*settings, "--export.types", "gguf"]) == 2
    assert "window_size 56 and llama.cpp computes with 112" in capsys.readouterr().err
    # An address to which no export can go.
    assert main([*settings, "--export.destination", "hf://user"]) == 2
    assert "'hf://user' is no repository of models" in capsys.readouterr().err
    assert not list((tmp_path / "store").glob("objects/*/*"))
    # Of a model on the Hub nothing is known before step 1.
    monkeypatch.setattr("flows.vision_finetune.check_inputs", lambda session: None)
    monkeypatch.setattr("tasks.load_model.local_folder", lambda model: None)
    config = {"model": {"name": str(model)}, "export": {"types": ["gguf"]}, "tracking": {"enabled": False}}
    with pytest.raises(ExportError, match="window_size 56"):
        vision_finetune(RunConfig.model_validate(config | {"runtime": {"store": str(tmp_path / "store")}}))


def test_rerun_from_forces_a_step_and_all_after_it(first_run: dict[str, Any], small_settings: dict[str, Any]) -> None:
    config = RunConfig.model_validate(small_settings)
    plan = planned(config, rerun_from="inference_mode")
    assert plan["train"].status == HIT
    assert plan["inference_mode.tuned"].status == FORCED
    summary = vision_finetune(config, rerun_from="inference_mode")
    assert {unit.split(".")[0] for unit in ran(summary)} == {"inference_mode", "evaluate_and_save"}
    # The same inputs give the same bytes.
    for name in (
        "inference_mode.tuned.predictions",
        "inference_mode.base.predictions",
        "evaluate_and_save.metrics.metrics",
    ):
        assert summary["artifacts"][name] == first_run["artifacts"][name]


def test_a_damaged_artifact_is_made_again(first_run: dict[str, Any], small_settings: dict[str, Any]) -> None:
    config = RunConfig.model_validate(small_settings)
    session = Session.open(config)
    assert session.local_root is not None
    digest = first_run["artifacts"]["evaluate_and_save.metrics.metrics"]
    entry = next(file for file in session.store.manifest(digest).files if file.path == "metrics.json")
    damaged = session.local_root / "objects" / entry.sha256[:2] / entry.sha256
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.chmod(0o644)
    damaged.write_bytes(bytes(content))
    summary = vision_finetune(config)
    assert "evaluate_and_save.metrics" in ran(summary)
    assert summary["artifacts"] == first_run["artifacts"]


def test_one_nested_mlflow_run_per_training(first_run: dict[str, Any], small_settings: dict[str, Any]) -> None:
    import mlflow

    store = Path(small_settings["runtime"]["store"])
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{store.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("vision-finetune")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    nested = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert nested
    parent = client.get_run(nested[-1].data.tags["mlflow.parentRunId"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["artifact.train.adapter"] == first_run["artifacts"]["train.adapter"]
    assert parent.data.params["lora.rank"] == "4"
    assert "tuned_cer" in parent.data.metrics
    assert {entry.path for entry in client.list_artifacts(parent.info.run_id)} == {"metrics.json", "report.html"}
    assert parent.inputs.dataset_inputs
    assert len(client.get_metric_history(nested[-1].info.run_id, "loss")) == 3
    shown = artifacts_of(parent.data.tags["prefect.flow_run_id"])
    assert {key: artifact.type for key, artifact in shown.items()} == {
        "metrics": "table",
        "summary": "markdown",
        "report": "markdown",
    }
    assert [row["metric"] for row in json.loads(shown["metrics"].data)] == list(first_run["metrics"]["metrics"])
    assert "| cer (lower is better) |" in shown["report"].data


def artifacts_of(flow_run_id: str) -> dict[str, Any]:
    """What a run shows on its page in the Prefect UI, by name; progress has none."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        return {entry.key: entry for entry in client.read_artifacts(artifact_filter=of_run) if entry.key is not None}


def test_a_training_that_resumes_keeps_its_curve_if_there_is_one(
    first_run: dict[str, Any], small_settings: dict[str, Any], tmp_path: Path
) -> None:
    def logged_to(every: int) -> str:
        session = Session.open(merged(small_settings, training={"log_every_steps": every}))
        tracker = Tracker(session, None)
        with tracker.training(tmp_path):
            run_id = str(mlflow.active_run().info.run_id)
        tracker.finish({}, {})
        return run_id

    import mlflow

    first = logged_to(1)
    # Neither decides about the training, so it resumes; the log would refuse another value.
    assert logged_to(2) == first
    (tmp_path / "mlflow_run_id").write_text("0" * 32)  # of a log that is not there any more
    second = logged_to(1)
    assert second not in (first, "0" * 32)
    (tmp_path / "mlflow_run_id").write_text("")  # the process was killed while it wrote it
    assert logged_to(1) not in (first, second)


def test_the_export_is_delivered_once(
    first_run: dict[str, Any], small_settings: dict[str, Any], tmp_path: Path
) -> None:
    config = merged(small_settings, export={"destination": str(tmp_path / "out")})
    vision_finetune(config)
    marker = tmp_path / "out" / "lora" / "artifact.json"
    assert json.loads(marker.read_text())["digest"] == first_run["artifacts"]["evaluate_and_save.export.lora.export"]
    written = (tmp_path / "out" / "lora" / "adapter_model.safetensors").stat().st_mtime_ns
    vision_finetune(config)
    assert (tmp_path / "out" / "lora" / "adapter_model.safetensors").stat().st_mtime_ns == written


def run_command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which talks to the test's server: to start another takes far longer."""
    from prefect.settings import PREFECT_API_URL

    command = [sys.executable, "-m", "flows.vision_finetune", *arguments]
    environment = {"PREFECT_API_URL": str(PREFECT_API_URL.value())} | environment
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=os.environ | environment)


@pytest.mark.parametrize("setting", ["--model.name", "--data.sources"])
def test_an_unreachable_hub_is_one_error(setting: str, tmp_path: Path) -> None:
    # A closed port of this machine, through the client that is really installed: it changed its HTTP library once.
    offline = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run_command(setting, "some/name", "--runtime.store", str(tmp_path / "store"), cwd=tmp_path, **offline)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "some/name" in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--model.name", "nowhere/at-all"], "nowhere/at-all"),
        (["--data.sources", "missing.parquet"], "missing.parquet"),
        (["--data.columns.answer", "transcrpt"], "transcrpt"),
        (["--training.optimizer", "adamw_8bit"], "needs a GPU"),
        (["--runtime.store", "/proc/store"], "/proc/store"),
    ],
)
def test_bad_input_is_one_error_without_a_traceback(settings: list[str], message: str, tmp_path: Path) -> None:
    done = run_command("--runtime.store", str(tmp_path / "store"), *settings, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert message in done.stderr


@pytest.mark.slow
def test_interrupted_trainings_go_on_from_their_checkpoints(tmp_path: Path) -> None:
    short = settings_on(tmp_path / "store")
    short["training"] |= {"max_steps": 40}
    (tmp_path / "run.yaml").write_text(json.dumps(short))  # JSON is YAML
    settings = ["--config", "run.yaml"]
    log, home = tmp_path / "mlflow.db", tmp_path / "prefect"

    # With an embedded server, as for most people: it has to end with the run, but not before it.
    complaint = interrupt(signal.SIGINT, settings, log, PREFECT_HOME=str(home))
    assert "the same command goes on from" in complaint
    assert "Traceback" not in complaint
    assert list((tmp_path / "store" / "work").glob("*/checkpoint-*"))
    with contextlib.closing(sqlite3.connect(home / "prefect.db")) as connection:
        assert connection.execute("select state_type from flow_run").fetchall() == [("CANCELLED",)]

    from prefect.settings import PREFECT_API_URL

    first = len(logged_steps(log))
    assert 0 < first < 40
    complaint = interrupt(signal.SIGTERM, settings, log, PREFECT_API_URL=str(PREFECT_API_URL.value()))
    assert "the same command goes on from" in complaint
    assert first < len(logged_steps(log)) < 40

    done = run_command(*settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "store" / "work").glob("*/checkpoint-*"))
    steps = logged_steps(log)
    # One curve: no step is trained, or logged, twice.
    assert steps == sorted(set(steps))
    assert steps[-1] == 40


def interrupt(signum: signal.Signals, settings: list[str], log: Path, **environment: str) -> str:
    """Starts the command, sends all its processes a signal when it has trained a step, and returns what it wrote."""
    command = [sys.executable, "-m", "flows.vision_finetune", *settings]
    known = len(logged_steps(log))
    process = subprocess.Popen(
        command, cwd=log.parent, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | environment
    )
    deadline = time.monotonic() + 300
    while len(logged_steps(log)) == known:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.3)
    os.killpg(process.pid, signum)  # as a terminal does, or Slurm
    # Half a minute is what Prefect gives a run that it cancels. The pipe ends with the last of the run's processes.
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    return complaint


def logged_steps(database: Path, figure: str = "loss") -> list[int]:
    if not database.exists():
        return []
    with contextlib.closing(sqlite3.connect(database)) as connection:
        try:
            return [step for (step,) in connection.execute("select step from metrics where key = ?", (figure,))]
        except sqlite3.OperationalError:
            return []


@pytest.fixture
def real_lines(shared_data: Path, tmp_path: Path) -> Callable[[str], RunConfig]:
    def config(name: str) -> RunConfig:
        sources = [
            {"path": str(shared_data / name / f"{s}.parquet"), "split": s, "max_rows": 8} for s in ("train", "test")
        ]
        return RunConfig.model_validate(
            {
                "data": {"sources": sources},
                "training": {"max_steps": 1, "gradient_accumulation": 1},
                "generation": {"max_rows": 2, "max_new_tokens": 8},
                "export": {"verify": False},
                "runtime": {"store": str(tmp_path / "store")},
                "tracking": {"enabled": False},
            }
        )

    return config


@pytest.mark.parametrize("name", ["sroie_lines", "tabmwp"])
def test_real_data(name: str, real_lines: Callable[[str], RunConfig]) -> None:
    summary = vision_finetune(real_lines(name))
    assert summary["metrics"]["num_rows"] == 2
