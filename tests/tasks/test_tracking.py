"""A tracking server that goes away, and comes back or not, while a flow is at work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.session import Session
from tasks.tracking import RUN_ID_FILE, Tracker
from vlm.config import RunConfig
from vlm.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('log') / 'mlflow.db'}"


@pytest.fixture
def tracker(log: str, tmp_path: Path) -> Iterator[Tracker]:
    import mlflow

    before = mlflow.get_tracking_uri()
    config = {
        "model": {"name": "builtin-random"},
        "runtime": {"store": str(tmp_path / "store")},
        "tracking": {"uri": log, "experiment": tmp_path.name},
    }
    yield Tracker(Session.open(RunConfig.model_validate(config)), None)
    while mlflow.active_run() is not None:
        mlflow.end_run()
    mlflow.set_tracking_uri(before)


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Takes the server away, and gives it back."""
    import mlflow
    from mlflow.exceptions import MlflowException

    names = ("log_metrics", "end_run", "set_tags", "log_artifact", "log_params")
    stock = {name: getattr(mlflow, name) for name in names}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MlflowException("API request failed: connection refused")

    def gone(is_gone: bool) -> None:
        for name in names:
            monkeypatch.setattr(mlflow, name, fail if is_gone else stock[name])

    return gone


def report(callback: Any, step: int) -> None:
    callback.on_log(None, SimpleNamespace(global_step=step), None, logs={"loss": 1 / step})


def losses(run_id: str) -> list[tuple[int, float]]:
    import mlflow

    return [(entry.step, entry.value) for entry in mlflow.MlflowClient().get_metric_history(run_id, "loss")]


def test_a_training_goes_on_without_its_server_and_sends_its_figures_at_the_end(
    tracker: Tracker, tmp_path: Path, outage: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), tracker.training(tmp_path) as callback:
        report(callback, 1)
        outage(True)
        report(callback, 2)
        report(callback, 4)
        outage(False)
        # Not tried again before the end, since each attempt may take minutes.
        report(callback, 5)
        run_id = (tmp_path / RUN_ID_FILE).read_text()
        assert losses(run_id) == [(1, 1.0)]
    assert losses(run_id) == [(1, 1.0), (2, 0.5), (4, 0.25), (5, 0.2)]
    assert sum("the training ends" in record.message for record in caplog.records) == 1


def test_a_server_that_stays_away_costs_the_training_nothing_and_ends_the_flow_in_one_line(
    tracker: Tracker, tmp_path: Path, outage: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), tracker.training(tmp_path) as callback:
        outage(True)
        report(callback, 1)
    assert "metrics.jsonl" in caplog.text
    with pytest.raises(ConfigError, match=r"can no longer be used \(API request failed.*run the same command again"):
        tracker.finish({}, {"cer": 0.5})


def test_a_training_that_is_interrupted_does_not_wait_for_its_server(
    tracker: Tracker, tmp_path: Path, outage: Callable[[bool], None]
) -> None:
    def train() -> None:
        with tracker.training(tmp_path) as callback:
            outage(True)
            report(callback, 1)
            callback.send_waiting = pytest.fail
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()


def test_a_server_that_is_gone_before_the_training_ends_it_before_it_begins(
    tracker: Tracker, tmp_path: Path, outage: Callable[[bool], None]
) -> None:
    tracker.start()
    outage(True)
    with pytest.raises(ConfigError, match="can no longer be used"), tracker.training(tmp_path):
        pytest.fail("there is nothing to log to")
    outage(False)
