"""What becomes of MLflow's runs and database when flows are killed, cancelled or fail; whole runs are in test_faults.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.killed_runs import NOTE_TAG, note_run
from tasks.session import Session
from tasks.tracking import Tracker
from tasks.tracking_database import database_of, first_use
from vlm.config import RunConfig
from vlm.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a database that these tests share: to make one takes a second."""
    return f"sqlite:///{tmp_path_factory.mktemp('log') / 'mlflow.db'}"


@pytest.fixture
def tracker(log: str, tmp_path: Path) -> Iterator[Callable[..., Tracker]]:
    """Makes the tracker of a run on one store, with an experiment of its own."""
    import mlflow

    before = mlflow.get_tracking_uri()

    def make(rank: int = 4, experiment: str = tmp_path.name) -> Tracker:
        config = {
            "model": {"name": "builtin-random"},
            "lora": {"rank": rank},
            "runtime": {"store": str(tmp_path / "store")},
            "tracking": {"uri": log, "experiment": experiment},
        }
        return Tracker(Session.open(RunConfig.model_validate(config)), None)

    yield make
    while mlflow.active_run() is not None:
        mlflow.end_run()
    mlflow.set_tracking_uri(before)


def killed(tracker: Tracker) -> str:
    """Leaves what a flow that logs to the same place leaves when it is killed; returns the id of its run."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=tracker.uri)
    note = note_run(tracker.session.store, tracker.uri, tracker._experiment, tracker._parameters)
    experiment = client.get_experiment_by_name(tracker._experiment)
    run = client.create_run(experiment.experiment_id, tags={NOTE_TAG: note.name})
    note.leave()
    return str(run.info.run_id)


def status(run_id: str | None) -> str:
    import mlflow

    return str(mlflow.get_run(run_id).info.status)


def test_a_run_whose_flow_is_gone_is_ended_by_the_next(tracker: Callable[..., Tracker]) -> None:
    living = tracker()
    living.start()
    gone = killed(living)
    assert status(gone) == "RUNNING"
    # The next flow, in this process, has its own run.
    import mlflow

    other = tracker(rank=8)
    with mlflow.start_run(nested=True):
        other.start_if_due(did_something=False)
        assert other.run_id is None, "that one had other settings"
    assert (status(gone), status(living.run_id)) == ("KILLED", "RUNNING")
    living.finish({}, {})
    assert status(living.run_id) == "FINISHED"
    assert not list(living.session.store.backend.walk("notes"))


def test_results_that_a_killed_run_did_not_log_are_logged_by_the_next_like_it(tracker: Callable[..., Tracker]) -> None:
    first = tracker()
    first.start()
    first.finish({}, {"tuned_cer": 0.5})
    again = tracker()
    again.start_if_due(did_something=False)
    assert again.run_id is None, "the results are there"
    gone = killed(again)
    again.start_if_due(did_something=False)
    assert again.run_id not in (None, gone)
    again.finish({}, {"tuned_cer": 0.5})
    assert (status(gone), status(again.run_id)) == ("KILLED", "FINISHED")
    gone = killed(tracker(rank=8))
    other = tracker()
    other.start_if_due(did_something=False)
    assert (other.run_id, status(gone)) == (None, "KILLED")


@pytest.mark.parametrize(
    ("error", "expected"), [(KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED"), (ValueError(), "FAILED")]
)
def test_a_cancelled_run_is_killed_and_one_with_an_error_has_failed(
    tracker: Callable[..., Tracker], tmp_path: Path, error: BaseException, expected: str
) -> None:
    import mlflow

    from flows.shared import failures_tracked

    run = tracker()
    run.session.tracker = run
    nested = []

    def train() -> None:
        with failures_tracked(run.session), run.training(tmp_path):
            nested.append(mlflow.active_run().info.run_id)
            raise error

    with pytest.raises(type(error)):
        train()
    assert (status(run.run_id), status(nested[0])) == (expected, expected)
    again = tracker()
    again.start_if_due(did_something=False)
    assert again.run_id is not None, "what came of it was never logged"
    again.finish({}, {})


def test_a_resumed_training_logs_no_step_twice_and_lies_below_the_run_that_resumes(
    tracker: Callable[..., Tracker], tmp_path: Path
) -> None:
    import mlflow
    from transformers import TrainerState

    def train(steps: range, **options: Any) -> tuple[str, str | None]:
        run = tracker(**options)
        with run.training(tmp_path) as callback:
            for step in steps:
                callback.on_log(None, TrainerState(global_step=step), None, logs={"loss": 1 / step, "kind": "text"})
            nested = str(mlflow.active_run().info.run_id)
        run.finish({}, {})
        return nested, run.run_id

    nested, _ = train(range(1, 4))
    again, parent = train(range(3, 6))
    assert again == nested
    client = mlflow.MlflowClient()
    history = client.get_metric_history(nested, "loss")
    assert [(entry.step, entry.value) for entry in history] == [(step, 1 / step) for step in range(1, 6)]
    assert client.get_run(nested).data.tags["mlflow.parentRunId"] == parent
    # MLflow refuses to go on with a run of another experiment.
    other, _ = train(range(5, 6), experiment=f"{tmp_path.name} other")
    assert other != nested


def test_a_note_is_kept_until_the_run_that_logs_instead_has_its_own(
    tracker: Callable[..., Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    first = tracker()
    first.start()
    first.fail(killed=True)
    again = tracker()
    with monkeypatch.context() as patch:
        patch.setattr("tasks.tracking.note_run", die)
        with pytest.raises(KeyboardInterrupt):
            again.start_if_due(did_something=False)
    last = tracker()
    last.start_if_due(did_something=False)
    assert last.run_id is not None
    last.finish({}, {})
    assert not list(last.session.store.backend.walk("notes"))


def test_a_half_made_database_is_made_anew(tmp_path: Path) -> None:
    import sqlite3

    database = tmp_path / "logs" / "mlflow.db"
    database.parent.mkdir()
    # Of a process that was killed while it made one.
    for name in ("mlflow.db.new", "mlflow.db.new-journal"):
        (database.parent / name).write_bytes(b"torn")
    with first_use(f"sqlite:///{database}"):
        connection = sqlite3.connect(database)
    assert connection.execute("select count(*) from experiments").fetchone() == (1,)
    connection.close()
    assert {path.name for path in database.parent.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_a_place_without_room_for_a_database_is_one_error(tmp_path: Path, tracker: Callable[..., Tracker]) -> None:
    (tmp_path / "file").write_text("no folder")
    run = tracker()
    run.uri = f"sqlite:///{tmp_path}/file/mlflow.db"
    with pytest.raises(ConfigError, match=r"tracking.uri 'sqlite:///.*file/mlflow.db' cannot be used"):
        run.start()


@pytest.mark.parametrize(
    ("uri", "database"),
    [
        ("sqlite:///runs/mlflow.db", "runs/mlflow.db"),
        ("sqlite:////data/mlflow.db?timeout=30", "/data/mlflow.db"),
        ("sqlite:///:memory:", None),
        ("http://127.0.0.1:5000", None),
    ],
)
def test_which_file_a_database_is(uri: str, database: str | None) -> None:
    assert database_of(uri) == (None if database is None else Path(database))
