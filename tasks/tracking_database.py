"""MLflow's database where runs go to a SQLite file, and the experiment in it: made by one process, whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def database_of(uri: str) -> Path | None:
    """The file of a SQLite database, or None where runs go elsewhere.

    Args:
        uri: A tracking address.
    """
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path) if uri.startswith("sqlite:///") and path not in ("", ":memory:") else None


@contextmanager
def first_use(uri: str) -> Iterator[None]:
    """Lets one process at a time create the SQLite tables: several at once fail half-way through.

    Args:
        uri: The tracking address; only that of a SQLite file needs this.
    """
    database = database_of(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():
            _create(database)
        yield


def set_experiment(uri: str, name: str) -> None:
    """Makes an experiment the current one; where runs go to a file, what they log lies beside it.

    Otherwise MLflow would put it into a folder of the working directory, whatever that happens to be.

    Args:
        uri: The tracking address.
        name: Of the experiment.
    """
    import mlflow

    database = database_of(uri)
    if database is not None and mlflow.get_experiment_by_name(name) is None:
        mlflow.create_experiment(name, artifact_location=_artifacts_beside(database).as_uri())
    mlflow.set_experiment(name)


def _create(database: Path) -> None:
    """Makes a database under another name, and renames it.

    MLflow makes its tables in hundreds of statements, each for good at once, and refuses a database in which some are
    missing: a process killed among them would leave one that no run could use.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    unfinished = database.with_name(f"{database.name}.new")
    for left in (unfinished, unfinished.with_name(f"{unfinished.name}-journal")):
        left.unlink(missing_ok=True)
    store = SqlAlchemyStore(f"sqlite:///{unfinished}", _artifacts_beside(database).as_uri())
    store.engine.dispose()
    os.replace(unfinished, database)


def _artifacts_beside(database: Path) -> Path:
    return database.absolute().parent / "mlflow_artifacts"
