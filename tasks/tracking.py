"""MLflow: one run per flow that did any work, and one nested run per training.

MLflow takes seconds to import, so a run with nothing to do never touches it; unless one like it was killed before it had
logged its results.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from artifacts.errors import StoreError
from artifacts.notes import Note
from artifacts.refs import ArtifactRef
from tasks.graph import Json
from tasks.killed_runs import NOTE_TAG, TrackingError, end_killed_runs, lacks_results, note_run
from tasks.session import Session
from tasks.tracking_database import first_use, set_experiment
from tasks.training_log import logged, metric_callback, unheard
from vlm.errors import ConfigError
from vlm.redaction import without_secrets

RUN_ID_FILE = "mlflow_run_id"

_log = logging.getLogger("flows")


def tracking_uri(session: Session) -> str:
    """The address that runs are logged to.

    The default is a SQLite file beside a local store, and in the working directory otherwise.
    """
    if session.config.tracking.uri is not None:
        return session.config.tracking.uri
    root = session.local_root
    folder = root.parent if root is not None else Path.cwd()
    return f"sqlite:///{folder / 'mlflow.db'}"


def viewer(uri: str) -> str:
    """How people look at the runs: a server's own address, or the command that shows a database.

    Args:
        uri: The tracking address.
    """
    uri = without_secrets(uri)
    return uri if uri.startswith(("http://", "https://")) else f"mlflow ui --backend-store-uri {uri}"


class Tracker:
    """Logs one flow run; opened by its training, and at the end of a run that did something else."""

    def __init__(self, session: Session, flow_run_id: str | None, shown: BaseModel | None = None) -> None:
        """Prepares, without importing MLflow.

        Args:
            session: The run to log.
            flow_run_id: Prefect's id of it.
            shown: The settings that become the run's parameters; None takes those of the session.
        """
        self.session = session
        self.shown = session.config if shown is None else shown
        self.flow_run_id = flow_run_id
        self.uri = tracking_uri(session)
        self.run_id: str | None = None
        self._note: Note | None = None

    def start(self) -> str:
        """Opens the MLflow run unless it is open; returns its id.

        Raises:
            ConfigError: The tracking address cannot be used.
        """
        if self.run_id is not None:
            return self.run_id
        import mlflow
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        mlflow.set_tracking_uri(self.uri)
        try:
            with first_use(self.uri):
                set_experiment(self.uri, self._experiment)
            self._note = note_run(self.session.store, self.uri, self._experiment, self._parameters)
            self.run_id = str(mlflow.start_run(tags=self._tags()).info.run_id)
            mlflow.log_params(self._parameters)
            with _left_to_the_next():
                end_killed_runs(self.session.store, self.uri)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            # Not chained: MLflow repeats the address, password and all, and Prefect keeps tracebacks.
            raise ConfigError(
                f"tracking.uri {self.uri!r} cannot be used ({error}); check the address and its login (MLFLOW_TRACKING_USERNAME"
                " and MLFLOW_TRACKING_PASSWORD), or set tracking.enabled to false"
            ) from None
        return self.run_id

    def start_if_due(self, *, did_something: bool) -> None:
        """Opens the MLflow run at the end of a flow, if there is something to log.

        Args:
            did_something: Whether a step ran. Otherwise there is, if a run with the same settings was killed after its last
                step and before it had logged what came out.
        """
        if not did_something:
            with _left_to_the_next():
                did_something = lacks_results(self.session.store, self.uri, self._parameters)
        if did_something:
            self.start()

    @contextmanager
    def training(self, work_dir: Path) -> Iterator[Any]:
        """Opens the nested run of a training, the same one again when it resumes; yields its logging callback."""
        self.start()
        import mlflow

        remembered = work_dir / RUN_ID_FILE
        with self.reached():
            run_id, callback = self._open_training(remembered.read_text().strip() if remembered.exists() else "")
        remembered.write_text(run_id)
        status = "FINISHED"
        try:
            yield callback
        except BaseException as error:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            raise
        finally:
            # Who is interrupted has no time to wait for a server.
            if status != "KILLED":
                with unheard():
                    callback.send_waiting()
            with unheard():
                mlflow.end_run(status)

    def _open_training(self, run_id: str) -> tuple[str, Any]:
        """Opens the nested run; returns its id and its logging callback.

        Args:
            run_id: Of the run that a training which resumes had; empty where there is none.
        """
        import mlflow

        if self._is_known(run_id):
            # It keeps its curve, below the flow run that finishes it.
            tags = self._tags() | {"mlflow.parentRunId": str(self.run_id)}
            mlflow.start_run(run_id=run_id, nested=True, tags=tags)
            return run_id, metric_callback(logged(run_id))
        nested = mlflow.start_run(run_name="train", nested=True, tags=self._tags())
        # Once: MLflow refuses another value, and how often to log or save may be another one by now.
        mlflow.log_params(flat({"training": self.session.config.training.model_dump(mode="json")}))
        return str(nested.info.run_id), metric_callback(frozenset())

    def log_report(self, metrics_dir: Path, report_dir: Path) -> None:
        """Puts the report page and the metrics beside the run's figures; for a run that was started.

        Args:
            metrics_dir: Folder of the metrics artifact.
            report_dir: Folder of the report artifact.
        """
        import mlflow

        with self.reached():
            mlflow.log_artifact(str(metrics_dir / "metrics.json"))
            mlflow.log_artifact(str(report_dir / "report.html"))

    def finish(self, digests: dict[str, ArtifactRef], metrics: dict[str, float]) -> None:
        """Logs what the run made and closes it; does nothing when nothing ran.

        Args:
            digests: Artifacts by name.
            metrics: Final figures by name.
        """
        if self.run_id is None:
            return
        import mlflow

        with self.reached():
            mlflow.set_tags({f"artifact.{name}": ref.digest for name, ref in digests.items()})
            mlflow.log_metrics(metrics)
            if dataset := digests.get("prepare_dataset.dataset"):
                _log_dataset(self.run_id, dataset, self.session.config.runtime.store)
            mlflow.end_run()
        assert self._note is not None
        try:
            self._note.remove()
        except StoreError as error:
            _log.warning(
                "A note of this run stays in the store: %s", error
            )  # whoever finds it sees that the run has ended

    def fail(self, killed: bool) -> None:
        """Closes the run of a flow that did not finish; the next one with the same settings logs what came out."""
        if self.run_id is not None:
            import mlflow
            from mlflow.exceptions import MlflowException

            while mlflow.active_run() is not None:
                try:
                    mlflow.end_run("KILLED" if killed else "FAILED")
                except MlflowException as error:
                    # What ended the flow is the error that counts; whoever comes next sees to this one by its note.
                    _log.warning("The MLflow run could not be closed: %s", error)
        if self._note is not None:
            self._note.leave()

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Where nothing can be done without MLflow.

        Raises:
            ConfigError: It cannot be reached any more.
        """
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            # Not chained, as in `start`.
            raise ConfigError(
                f"tracking.uri {self.uri!r} can no longer be used ({error}); what was done is in the store: see to the server, and"
                " run the same command again, which goes on and logs the results"
            ) from None

    @property
    def _experiment(self) -> str:
        return self.session.config.tracking.experiment

    @cached_property
    def _parameters(self) -> dict[str, str]:
        return flat(self.shown.model_dump(mode="json", exclude={"runtime", "tracking"}))

    def _tags(self) -> dict[str, str]:
        tags = {} if self._note is None else {NOTE_TAG: self._note.name}
        return tags | ({"prefect.flow_run_id": self.flow_run_id} if self.flow_run_id else {})

    def _is_known(self, run_id: str) -> bool:
        """Whether there is a run of that id where this one logs.

        The log may have been removed, or moved, or another experiment been chosen, since a training was killed.
        """
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            if not run_id or (run := mlflow.get_run(run_id)).info.lifecycle_stage != "active":
                return False
            experiment = mlflow.get_experiment_by_name(self._experiment)
        except MlflowException:
            return False
        return experiment is not None and run.info.experiment_id == experiment.experiment_id


@contextmanager
def training_callbacks(session: Session, work_dir: Path) -> Iterator[list[Any]]:
    """The callbacks with which a training reports to whatever tracks this run."""
    if session.tracker is None:
        yield []
        return
    with session.tracker.training(work_dir) as callback:
        yield [callback]


@contextmanager
def _left_to_the_next() -> Iterator[None]:
    """What killed flows left is no reason to fail."""
    try:
        yield
    except (StoreError, TrackingError) as error:
        _log.warning("MLflow may still show runs of flows that were killed as running: %s", error)


def flat(tree: Json, prefix: str = "") -> dict[str, str]:
    """Flattens nested settings to dotted names, as MLflow shows parameters, without passwords of addresses."""
    leaves: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = without_secrets(str(value))
    return leaves


def _log_dataset(run_id: str, ref: ArtifactRef, store: str) -> None:
    """Notes the prepared dataset as the run's input; MLflow keeps 36 characters of a digest, so the source has all."""
    import mlflow
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"store": without_secrets(store), "artifact": ref.digest})
    dataset = Dataset(name="dataset", digest=ref.digest[:36], source_type="artifact", source=source)
    used = DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
    mlflow.MlflowClient().log_inputs(run_id, datasets=[used])
