"""MLflow's database and what it must hold after runs that were disturbed, read without MLflow."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tasks.tracking_database import first_use
from tests.support.forked import die_at

# What a step of a training must give to the bit.
_EXACT = ("loss", "grad_norm", "learning_rate")

Curve = dict[str, list[tuple[int, float]]]


def make_database(database: Path) -> dict[str, int]:
    """Makes an empty database, in a child; gives the number of changes that it takes."""
    num_changes = die_at(database.parent, None, statements=True)
    with first_use(f"sqlite:///{database}"):
        return {"changes": num_changes()}


class Log:
    """What a database holds.

    Args:
        database: The file.

    Attributes:
        faults: What is wrong with the file itself; empty if all is well.
        status: Of each run, by id.
        parents: Id of the run that each nested run lies below.
    """

    def __init__(self, database: Path) -> None:
        with contextlib.closing(sqlite3.connect(database)) as connection:
            self.faults = [
                f"{database.name}: {line}" for (line,) in connection.execute("pragma integrity_check") if line != "ok"
            ]
            self.status: dict[str, str] = dict(connection.execute("select run_uuid, status from runs"))
            tags = connection.execute("select run_uuid, key, value from tags").fetchall()
            self._figures = connection.execute("select run_uuid, key, step, value from metrics").fetchall()
            self._artifacts = dict(connection.execute("select run_uuid, artifact_uri from runs"))
        self._tags = {(run, key): value for run, key, value in tags}
        self.parents: dict[str, str] = {run: value for run, key, value in tags if key == "mlflow.parentRunId"}

    def curve(self, run: str) -> Curve:
        """The figures of a training by name, each with its step, in order of steps."""
        return {
            name: sorted((step, value) for found, key, step, value in self._figures if (found, key) == (run, name))
            for name in _EXACT
        }

    def with_status(self, status: str, *, nested: bool) -> list[str]:
        """Ids of the flows' own runs, or of their nested ones, in a state."""
        return [run for run, found in self.status.items() if found == status and (run in self.parents) == nested]

    def check_finished(self, summary: dict[str, Any], curve: Curve) -> list[str]:
        """What is wrong after a flow has finished, however often it was disturbed before.

        Args:
            summary: Of the flow.
            curve: Of an undisturbed training.

        Returns:
            A line each.
        """
        faults = list(self.faults)
        if others := {run: status for run, status in self.status.items() if status not in ("FINISHED", "KILLED")}:
            faults.append(f"runs are in other states than finished and killed: {others}")
        trainings = self.with_status("FINISHED", nested=True)
        if len(trainings) != 1:
            faults.append(f"{len(trainings)} trainings have finished")
        for training in trainings:
            if (found := self.curve(training)) != curve:
                faults.append(f"the curve is {found} and not {curve}")
            if self.parents[training] not in self.status:
                faults.append("a training lies below a run that is not there")
        repeated = Counter((run, name, step) for run, name, step, _ in self._figures if name != "epoch")
        faults += [f"logged {count} times: {which}" for which, count in repeated.items() if count > 1]
        finished = self.with_status("FINISHED", nested=False)
        if not finished:
            faults.append("no run has finished")
        for run in finished:
            faults += [f"run {run}: {fault}" for fault in self._check_results(run, summary)]
        return faults

    def _check_results(self, run: str, summary: dict[str, Any]) -> list[str]:
        faults = [
            f"tag artifact.{name} is {self._tags.get((run, f'artifact.{name}'))}"
            for name, digest in summary["artifacts"].items()
            if self._tags.get((run, f"artifact.{name}")) != digest
        ]
        logged = {key: value for found, key, _, value in self._figures if found == run}
        wanted = {
            f"{which}_{name}": float(of_models[which]["value"])
            for name, of_models in summary["metrics"]["metrics"].items()
            for which in ("tuned", "base")
        }
        if logged != wanted:
            faults.append(f"the figures are {logged} and not {wanted}")
        folder = Path(url2pathname(urlsplit(self._artifacts[run]).path))
        files = {path.name: path.stat().st_size for path in folder.glob("*")}
        if set(files) != {"metrics.json", "report.html"} or not all(files.values()):
            faults.append(f"the files are {files}")
        return faults
