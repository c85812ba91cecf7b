"""Kills of whole runs at counted and random moments, and what must be true afterwards."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from artifacts.store import Store
from tasks.session import Session
from tests.support.forked import AFTERWARDS, fork, import_all, import_most, run_and_die, run_to_the_end, settings
from tests.support.local_flow import code_digest_once, exact_artifacts
from tests.support.mlflow_log import Log, make_database
from vlm.config import RunConfig

_MARKER = "complete.json"
# The steps before these do not log.
_LOGGING = ("train", "inference_mode.base", "inference_mode.tuned", "evaluate_and_save.*")


@dataclass
class Kill:
    """One kill.

    Attributes:
        unit: What the run was at: the first unit without a record.
        how: ``count`` or ``time``.
        checkpoint: Step of the newest complete checkpoint that the killed run left, or 0.
        num_half_written: Files in the store's ``tmp`` afterwards, and checkpoints without their marker.
    """

    unit: str
    how: str
    checkpoint: int
    num_half_written: int


@dataclass
class Report:
    """What a series of kills gave.

    Attributes:
        kills: All of them.
        num_runs: Runs that were left to finish.
        num_resumed: Trainings that went on from a checkpoint.
        num_ended: MLflow runs of killed flows that a later one ended.
        faults: What should not be; empty if all is well.
    """

    kills: list[Kill] = field(default_factory=list)
    num_runs: int = 0
    num_resumed: int = 0
    num_ended: int = 0
    faults: list[str] = field(default_factory=list)


class Undisturbed:
    """Imports everything and lets two runs finish, one of them tracked: what all others must give.

    Args:
        folder: Receives their stores; made here.

    Attributes:
        expected: Their artifacts.
        changes: Changes by unit and afterwards, of the run without tracking.
        tracked_changes: The same of the other one, statements to the database included, but for the making of it.
        seconds: How long a run takes.
        curve: What the tracked one's training logged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        import_most()
        session = Session.open(RunConfig.model_validate(settings(str(self.store("tracked")))))
        for unit in session.units:
            code_digest_once(unit.code, cache_dir=session.cache_dir)
        tracked = self._run("tracked", tracking=True)
        self.expected = exact_artifacts(tracked["summary"])
        self.tracked_changes: dict[str, int] = tracked["changes"]
        import_all(tracked["modules"])
        started = time.monotonic()
        plain = self._run("plain", tracking=False)
        self.seconds = time.monotonic() - started
        self.changes: dict[str, int] = plain["changes"]
        assert exact_artifacts(plain["summary"]) == self.expected, "undisturbed runs differ"
        log = Log(folder / "tracked" / "mlflow.db")
        (training,) = log.with_status("FINISHED", nested=True)
        self.curve = log.curve(training)
        assert (faults := log.check_finished(tracked["summary"], self.curve)) == [], faults
        assert len(self.curve["loss"]) == settings("")["training"]["max_steps"]
        made = fork(lambda: make_database(self.database), folder / "answer.json").wait()
        assert made is not None
        self.tracked_changes["train"] -= made["changes"]

    @property
    def database(self) -> Path:
        """An empty database of MLflow's."""
        return self._folder / "empty" / "mlflow.db"

    def store(self, name: str) -> Path:
        """Where the store of that name lies: ``tracked`` and ``plain`` hold finished runs."""
        return self._folder / name / "store"

    def copy(self, name: str, folder: Path) -> Path:
        """Copies the store of that name; returns where the copy lies, which is ``store`` below the folder."""
        self._copy(name, folder)
        # The store knows its objects by their place on the disk; a run looks at all of them anew.
        config = settings(str(folder / "store"))
        answer = fork(lambda: {"summary": run_to_the_end(config)}, folder / "answer.json").wait()
        assert answer is not None
        assert all(step["cached"] for step in answer["summary"]["steps"].values())
        return folder / "store"

    def prepare_logging(self, root: Path) -> None:
        """Makes a store in which every step before the training is done, and an empty database beside it."""
        self._copy("plain", root.parent)
        for pattern in _LOGGING:
            for records in (root / "index").glob(pattern):
                shutil.rmtree(records)
        shutil.copyfile(self.database, root.parent / "mlflow.db")

    def _copy(self, name: str, folder: Path) -> None:
        copies: dict[int, str] = {}

        def copy(source: str, target: str) -> None:
            # Folders of artifacts are links to objects, in the copy too.
            number = os.stat(source).st_ino
            if number in copies:
                os.link(copies[number], target)
            else:
                copies[number] = target
                shutil.copy2(source, target)

        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.store(name), folder / "store", copy_function=copy)

    def _run(self, name: str, *, tracking: bool) -> dict[str, Any]:
        config = settings(str(self.store(name)), tracking=tracking)
        child = fork(lambda: run_and_die(config, self._folder / name, None), self._folder / "answer.json")
        answer = child.wait()
        assert answer is not None
        return answer


class KillSeries:
    """Kills runs on one store after the other, until each has finished.

    Args:
        folder: Receives the stores.
        seed: Of the moments.
        undisturbed: What the runs must give.
        tracking: Whether MLflow keeps a log beside each store. The steps before the training, which log nothing, are then
            done already, so that every kill counts.
    """

    def __init__(self, folder: Path, seed: int, undisturbed: Undisturbed, *, tracking: bool = False) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self._undisturbed = undisturbed
        self._tracking = tracking
        self._changes = undisturbed.tracked_changes if tracking else undisturbed.changes
        self.report = Report()

    def run(self, num_kills: int, *, by_time: float = 0.0) -> Report:
        """Kills so often, at random moments.

        Args:
            num_kills: How often.
            by_time: Share of the kills that come from outside, at a random time.
        """

        def choose(store: Store) -> int | float | None:
            if len(self.report.kills) >= num_kills:
                return None
            if self._random.random() < by_time:
                return self._random.uniform(0.05, 1.0) * self._undisturbed.seconds
            return self._random.randint(1, self._reach(store))

        for number in itertools.count():
            if len(self.report.kills) >= num_kills:
                return self.report
            self._one_store(f"killed-{number}", choose)

    def run_at(self, moments: Sequence[float]) -> Report:
        """Kills one run after the other at chosen moments, and lets the last one finish.

        Args:
            moments: Each as a share of the changes that are left to an undisturbed run, from the first unit without a
                record on.
        """
        left = iter(moments)

        def choose(store: Store) -> int | None:
            share = next(left, None)
            return None if share is None else 1 + round(share * self._rest(store))

        self._one_store("killed", choose)
        return self.report

    def _one_store(self, name: str, choose: Callable[[Store], int | float | None]) -> None:
        """Runs until one finishes; each is killed at a count of changes, at a time in seconds, or not at all."""
        folder = self._folder / name
        root = folder / "store"
        if self._tracking:
            self._undisturbed.prepare_logging(root)
        store = Store.open(str(root))
        config = settings(str(root), tracking=self._tracking)
        while True:
            expected_step = newest_checkpoint(root)
            was_trained = bool(store.records("train"))
            moment = choose(store)
            count = moment if isinstance(moment, int) else None
            child = fork(partial(run_and_die, config, folder, count), self._folder / "answer.json")
            if isinstance(moment, float):
                time.sleep(moment)
                os.kill(child.pid, signal.SIGKILL)
            answer = child.wait()
            self._check(store, name)
            if not was_trained and (records := store.records("train")):
                self._check_resumed(store, records[0].outputs["training"].digest, expected_step, name)
            if answer is not None:
                break
            how = "time" if isinstance(moment, float) else "count"
            self.report.kills.append(Kill(self._unit_at_work(store), how, newest_checkpoint(root), waste(root)))
        self.report.num_runs += 1
        expected = self._undisturbed.expected
        if (found := exact_artifacts(answer["summary"])) != expected:
            different = sorted(key for key in found if found[key] != expected[key])
            self.report.faults.append(f"{name}: other artifacts than the undisturbed run: {different}")
        if list((root / "work").glob("*/checkpoint-*")):
            self.report.faults.append(f"{name}: checkpoints were left behind")
        if self._tracking:
            log = Log(folder / "mlflow.db")
            faults = log.check_finished(answer["summary"], self._undisturbed.curve)
            self.report.faults += [f"{name}: {fault}" for fault in faults]
            self.report.num_ended += len(log.with_status("KILLED", nested=False))

    def _reach(self, store: Store) -> int:
        """Within how many changes the next kill comes."""
        if self._tracking:
            # Anywhere in what is left, and now and then past it. To open another MLflow run takes some statements more.
            return 200 + round(1.3 * self._rest(store))
        # Now and then past the end of a unit, so that each has its turn.
        return 20 + round(1.3 * self._changes[self._unit_at_work(store)])

    def _rest(self, store: Store) -> int:
        """Number of changes that are left to an undisturbed run."""
        units = list(self._changes)
        return sum(self._changes[name] for name in units[units.index(self._unit_at_work(store)) :])

    def _check(self, store: Store, name: str) -> None:
        self.report.faults += [f"{name}: {problem.path}: {problem.what}" for problem in store.verify().problems]
        if self._tracking:
            self.report.faults += [f"{name}: {fault}" for fault in Log(self._folder / name / "mlflow.db").faults]

    def _check_resumed(self, store: Store, digest: str, expected_step: int, name: str) -> None:
        resumed = json.loads(store.read_text(digest, "training.json"))["resumed_from_step"]
        self.report.num_resumed += resumed is not None
        if (resumed or 0) != expected_step:
            self.report.faults.append(f"{name}: resumed from {resumed} with a checkpoint of step {expected_step}")

    def _unit_at_work(self, store: Store) -> str:
        units = (unit for unit in self._changes if unit != AFTERWARDS)
        return next((unit for unit in units if not store.records(unit, limit=1)), AFTERWARDS)


def checkpoint_folders(root: Path) -> Iterator[Path]:
    """Folders of checkpoints of interrupted trainings, whole or not."""
    yield from (root / "work").glob("*/checkpoint-*")


def newest_checkpoint(root: Path) -> int:
    """Step of the newest complete checkpoint of a store's interrupted training, or 0."""
    steps = [int(path.name.rpartition("-")[2]) for path in checkpoint_folders(root) if (path / _MARKER).exists()]
    return max(steps, default=0)


def waste(root: Path) -> int:
    """Number of half-written things in a store."""
    scratch = sum(1 for path in (root / "tmp").rglob("*") if path.is_file() and not path.name.startswith("owner."))
    return scratch + sum(1 for path in checkpoint_folders(root) if not (path / _MARKER).exists())
