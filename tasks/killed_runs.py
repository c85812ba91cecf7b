"""MLflow runs of flows that were killed, which MLflow would show as running for ever.

Each flow that logs leaves a note in its store until its MLflow run has ended well, and tags that run, and the nested one
of its training, with the note's name. The next flow that logs to the same place, whatever its settings, finds the notes of
those that are gone and ends what they left open.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from artifacts.keys import canonical_digest
from artifacts.notes import Note
from artifacts.store import Store
from tasks.tracking_database import database_of

NOTE_TAG = "vision_finetune.note"
_PARENT_TAG = "mlflow.parentRunId"


class TrackingError(Exception):
    """MLflow could not be asked."""


_log = logging.getLogger("flows")


def note_run(store: Store, uri: str, experiment: str, parameters: Mapping[str, str]) -> Note:
    """Notes that a run is about to be logged.

    Args:
        store: The flow's store.
        uri: The tracking address; the note holds none of it that could be read.
        experiment: Name of MLflow's experiment.
        parameters: Of the run.
    """
    fields = {"mlflow": canonical_digest(uri), "experiment": experiment, "parameters": canonical_digest(parameters)}
    return store.note(fields)


def end_killed_runs(store: Store, uri: str) -> None:
    """Marks as killed what flows that are gone left running; imports MLflow only if there was such a flow.

    Args:
        store: The flow's store.
        uri: The tracking address.

    Raises:
        StoreError: The store could not be read.
        TrackingError: MLflow could not be asked; what was not ended is left to the next flow.
    """
    for _ in _left_runs(store, uri):
        pass


def lacks_results(store: Store, uri: str, parameters: Mapping[str, str]) -> bool:
    """As `end_killed_runs`, up to the first flow with these parameters that did not log its results.

    Its note stays, until the flow that logs them has one of its own and calls `end_killed_runs`.

    Args:
        store: The flow's store.
        uri: The tracking address.
        parameters: Of the run that is going on.

    Returns:
        Whether there was one.

    Raises:
        StoreError: The store could not be read.
        TrackingError: MLflow could not be asked.
    """
    wanted = canonical_digest(parameters)
    return any(found == wanted and not finished for found, finished in _left_runs(store, uri))


def _left_runs(store: Store, uri: str) -> Iterator[tuple[str, bool]]:
    """Ends runs; yields the digest of each one's parameters, and whether it had finished, before its note is removed."""
    ours = canonical_digest(uri)
    for name, fields in store.left_notes(lambda fields: fields.get("mlflow") == ours):
        yield str(fields["parameters"]), _end(uri, str(fields["experiment"]), name)


def _end(uri: str, experiment_name: str, note: str) -> bool:
    """Ends all runs with a tag; returns whether the flow's own had finished."""
    database = database_of(uri)
    if database is not None and not database.exists():
        return False  # somebody has removed it, with its runs
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        return False
    finished = False
    for run in client.search_runs([experiment.experiment_id], f"tags.`{NOTE_TAG}` = '{note}'"):
        if run.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, "KILLED")
            _log.warning(
                "MLflow run %s of a flow that is gone was still open; it is marked as killed.", run.info.run_id
            )
        elif run.info.status == "FINISHED":
            finished |= _PARENT_TAG not in run.data.tags
    return finished
