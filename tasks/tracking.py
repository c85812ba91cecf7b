"""MLflow: one run per flow that did any work, and one nested run per training.

MLflow takes seconds to import, so a run with nothing to do never touches it.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from artifacts.refs import ArtifactRef
from tasks.graph import Json
from tasks.session import Session
from vlm.errors import ConfigError
from vlm.redaction import without_secrets

RUN_ID_FILE = "mlflow_run_id"


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
    """Logs one flow run; opened by the first step that really runs."""

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

    def start(self) -> str:
        """Opens the MLflow run unless it is open; returns its id.

        Raises:
            ConfigError: The tracking address cannot be used.
        """
        if self.run_id is not None:
            return self.run_id
        import mlflow
        from mlflow.exceptions import MlflowException

        mlflow.set_tracking_uri(self.uri)
        try:
            with first_use(self.uri):
                _set_experiment(self.uri, self.session.config.tracking.experiment)
            run = mlflow.start_run(tags=self._tags())
        except MlflowException as error:
            # Not chained: MLflow repeats the address, password and all, and Prefect keeps tracebacks.
            raise ConfigError(
                f"tracking.uri {self.uri!r} cannot be used ({error}); check the address and its login (MLFLOW_TRACKING_USERNAME"
                " and MLFLOW_TRACKING_PASSWORD), or set tracking.enabled to false"
            ) from None
        mlflow.log_params(flat(self.shown.model_dump(mode="json", exclude={"runtime", "tracking"})))
        self.run_id = str(run.info.run_id)
        return self.run_id

    @contextmanager
    def training(self, work_dir: Path) -> Iterator[Any]:
        """Opens the nested run of a training, the same one again when it resumes; yields its logging callback."""
        self.start()
        import mlflow

        remembered = work_dir / RUN_ID_FILE
        run_id = remembered.read_text().strip() if remembered.exists() else ""
        resumes = _is_known(run_id)
        if resumes:
            # A nested run that resumes keeps its curve, below the flow run that finishes it.
            nested = mlflow.start_run(run_id=run_id, nested=True)
        else:
            nested = mlflow.start_run(run_name="train", nested=True, tags=self._tags())
        try:
            if not resumes:
                # Once: MLflow refuses another value, and how often to log or save may be another one by now.
                mlflow.log_params(flat({"training": self.session.config.training.model_dump(mode="json")}))
                remembered.write_text(nested.info.run_id)
            yield _metric_callback()
        except BaseException as error:
            mlflow.end_run("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        mlflow.end_run()

    def log_report(self, metrics_dir: Path, report_dir: Path) -> None:
        """Puts the report page and the metrics beside the run's figures; for a run that was started.

        Args:
            metrics_dir: Folder of the metrics artifact.
            report_dir: Folder of the report artifact.
        """
        import mlflow

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

        mlflow.set_tags({f"artifact.{name}": ref.digest for name, ref in digests.items()})
        mlflow.log_metrics(metrics)
        if dataset := digests.get("prepare_dataset.dataset"):
            _log_dataset(self.run_id, dataset, self.session.config.runtime.store)
        mlflow.end_run()

    def fail(self, killed: bool) -> None:
        """Closes the run of a flow that did not finish."""
        if self.run_id is not None:
            import mlflow

            while mlflow.active_run() is not None:
                mlflow.end_run("KILLED" if killed else "FAILED")

    def _tags(self) -> dict[str, str]:
        return {"prefect.flow_run_id": self.flow_run_id} if self.flow_run_id else {}


@contextmanager
def training_callbacks(session: Session, work_dir: Path) -> Iterator[list[Any]]:
    """The callbacks with which a training reports to whatever tracks this run."""
    if session.tracker is None:
        yield []
        return
    with session.tracker.training(work_dir) as callback:
        yield [callback]


def flat(tree: Json, prefix: str = "") -> dict[str, str]:
    """Flattens nested settings to dotted names, as MLflow shows parameters, without passwords of addresses."""
    leaves: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = without_secrets(str(value))
    return leaves


def _set_experiment(uri: str, name: str) -> None:
    """Makes an experiment the current one; where runs go to a file, what they log lies beside it.

    Otherwise MLflow would put it into a folder of the working directory, whatever that happens to be.
    """
    import mlflow

    if uri.startswith("sqlite:///") and mlflow.get_experiment_by_name(name) is None:
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlflow_artifacts"
        mlflow.create_experiment(name, artifact_location=folder.as_uri())
    mlflow.set_experiment(name)


def _is_known(run_id: str) -> bool:
    """Whether there is still a run of that id; the log may have been removed, or moved, since a training was killed."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return bool(run_id) and mlflow.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:
        return False


@contextmanager
def first_use(uri: str) -> Iterator[None]:
    """Lets one process at a time create the SQLite tables: several at once fail half-way through.

    Args:
        uri: The tracking address; only that of a SQLite file needs this.
    """
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _log_dataset(run_id: str, ref: ArtifactRef, store: str) -> None:
    """Notes the prepared dataset as the run's input; MLflow keeps 36 characters of a digest, so the source has all."""
    import mlflow
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"store": without_secrets(store), "artifact": ref.digest})
    dataset = Dataset(name="dataset", digest=ref.digest[:36], source_type="artifact", source=source)
    used = DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
    mlflow.MlflowClient().log_inputs(run_id, datasets=[used])


def _metric_callback() -> Any:
    import mlflow
    from transformers import TrainerCallback

    class LogMetrics(TrainerCallback):
        """Sends every logged figure to the active MLflow run."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            figures = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
            mlflow.log_metrics(figures, step=state.global_step)

    return LogMetrics()
