"""Runs of the whole pipeline in forked processes that are killed on the way, and what must be true afterwards.

A process that has imported everything, and computed nothing, forks one child per run: that saves a child the imports.
A child counts what it does to the files of its store, before it does it, and kills itself at a given count; a count hits
the same moment again where a time does not. Children can also be killed from outside, at a time.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from artifacts.store import Store
from tasks.session import Session, UnitResult
from tests.support.local_flow import code_digest_once, exact_artifacts, run_flow_locally
from vlm.config import RunConfig

# Opening for reading changes nothing.
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.utime")
_MARKER = "complete.json"


def import_most() -> None:
    """Imports what takes longest of what a run needs."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import pyarrow.dataset  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    import vlm.evaluation.evaluate
    import vlm.training.train  # noqa: F401


def import_all(names: Iterable[str]) -> None:
    """Imports modules that a child came to need, so that the next ones have them."""
    for name in names:
        if name not in sys.modules:
            with suppress(ImportError):  # some exist only beside the one that made them
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or every child would look through all of it for garbage


def settings(store: str, *, tracking: bool = False, **training: Any) -> dict[str, Any]:
    """Settings of a run of about three seconds that writes a checkpoint at every step.

    Args:
        store: Address of the artifact store.
        tracking: Whether MLflow keeps a log beside the store.
        **training: Other settings of the training.
    """
    return {
        "model": {"name": "builtin-random"},
        "data": {"sources": [{"path": "builtin", "max_rows": 48}]},
        "lora": {"rank": 4, "dropout": 0.1},  # so that the random state must be resumed too
        "training": {
            "max_steps": 5,
            "gradient_accumulation": 1,
            "log_every_steps": 1,
            "checkpoint_every_steps": 1,
            **training,
        },
        "generation": {"max_new_tokens": 6, "max_rows": 2},
        "export": {"verify": False},
        "runtime": {"store": store},
        "tracking": {"enabled": tracking},
    }


def die_at(root: Path, count: int | None) -> Callable[[], int]:
    """Has this process kill itself just before its so-many-th change to the files of a folder.

    Args:
        root: The folder.
        count: From 1; None lets it live.

    Returns:
        Gives the number of changes so far.
    """
    inside = f"{root}{os.sep}"
    done = 0

    def is_inside(path: Any, folder: int) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        name = os.fsdecode(path)
        if not os.path.isabs(name) and folder >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        return name.startswith(inside)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event == "open":
            changes = bool((arguments[2] or 0) & _WRITING) and is_inside(arguments[0], -1)
        else:
            # The folder that a relative name is in comes last, where there is one.
            folder = arguments[-1] if arguments and isinstance(arguments[-1], int) else -1
            changes = event in _CHANGES and is_inside(arguments[0], folder)
        if changes:
            done += 1
            if done == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return lambda: done


@dataclass
class Child:
    """A forked process.

    Attributes:
        pid: Its id.
        answer_file: What it gives when it ends well.
        started: When it was forked, on the clock of `time.monotonic`.
    """

    pid: int
    answer_file: Path
    started: float = field(default_factory=time.monotonic)

    def wait(self, seconds: float = 400.0) -> dict[str, Any] | None:
        """Waits for its end.

        Args:
            seconds: It is killed after so many, and this raises.

        Returns:
            What it gave, or None if it was killed.
        """
        deadline = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"a run did not end within {seconds} s")
            time.sleep(0.01)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            return None
        answer: dict[str, Any] = json.loads(self.answer_file.read_text())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def fork(work: Callable[[], dict[str, Any]], answer_file: Path) -> Child:
    """Does work in a forked process.

    Args:
        work: What it does; returns what `Child.wait` gives.
        answer_file: Receives that.
    """
    answer_file.unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    return Child(pid, answer_file) if pid else _work_and_exit(work, answer_file)


def _work_and_exit(work: Callable[[], dict[str, Any]], answer_file: Path) -> NoReturn:
    try:
        answer = work()
    except BaseException:
        answer = {"error": traceback.format_exc()}
    answer_file.write_text(json.dumps(answer))
    os._exit(0)


def run_and_die(config: dict[str, Any], root: Path, count: int | None) -> dict[str, Any]:
    """One run, in a child.

    Returns:
        Its summary, the number of its changes to files by unit, and all modules that it imported.
    """
    num_changes = die_at(root, count)
    changes: dict[str, int] = {}
    run = Session.run

    def counted(session: Session, name: str, *arguments: Any) -> UnitResult:
        before = num_changes()
        result = run(session, name, *arguments)
        changes[name] = num_changes() - before
        return result

    with mock.patch.object(Session, "run", counted):
        summary = run_flow_locally(RunConfig.model_validate(config))
    return {"summary": summary, "changes": changes, "modules": sorted(sys.modules)}


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
        faults: What should not be; empty if all is well.
    """

    kills: list[Kill] = field(default_factory=list)
    num_runs: int = 0
    num_resumed: int = 0
    faults: list[str] = field(default_factory=list)


class KillSeries:
    """Kills runs on one store after the other, until each has finished.

    Args:
        folder: Receives the stores.
        seed: Of the moments.
        tracking: Whether MLflow keeps a log beside each store.
    """

    def __init__(self, folder: Path, seed: int, *, tracking: bool = False) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self._tracking = tracking
        self.report = Report()
        import_most()
        session = Session.open(RunConfig.model_validate(settings(str(self.root("undisturbed")))))
        for unit in session.units:
            code_digest_once(unit.code, cache_dir=session.cache_dir)
        first = self._start("undisturbed", None).wait()
        assert first is not None
        self.expected = exact_artifacts(first["summary"])
        self.changes: dict[str, int] = first["changes"]
        import_all(first["modules"])
        again = self._start("again", None)
        second = again.wait()
        assert second is not None
        assert exact_artifacts(second["summary"]) == self.expected, "undisturbed runs differ"
        self._seconds = time.monotonic() - again.started

    def run(self, num_kills: int, *, by_time: float = 0.0) -> Report:
        """Kills so often.

        Args:
            num_kills: How often.
            by_time: Share of the kills that come from outside, at a random time.
        """
        for number in range(num_kills):
            if len(self.report.kills) >= num_kills:
                break
            self._one_store(f"killed-{number}", num_kills, by_time)
        return self.report

    def root(self, name: str) -> Path:
        """Where the store of that name lies: ``undisturbed`` and ``again`` hold finished runs."""
        return self._folder / name / "store"

    def _start(self, name: str, count: int | None) -> Child:
        root = self.root(name)
        config = settings(str(root), tracking=self._tracking)
        return fork(lambda: run_and_die(config, root, count), self._folder / "answer.json")

    def _one_store(self, name: str, num_kills: int, by_time: float) -> None:
        root = self.root(name)
        store = Store.open(str(root))
        while True:
            expected_step = newest_checkpoint(root)
            was_trained = bool(store.records("train"))
            from_outside = self._random.random() < by_time
            last = len(self.report.kills) >= num_kills
            # Now and then past the end of a unit, so that each has its turn.
            reach = 20 + round(1.3 * self.changes.get(self._unit_at_work(store), 10))
            count = None if last or from_outside else self._random.randint(1, reach)
            child = self._start(name, count)
            if from_outside and not last:
                time.sleep(self._random.uniform(0.05, 1.0) * self._seconds)
                os.kill(child.pid, signal.SIGKILL)
            answer = child.wait()
            self._check(store, name)
            if not was_trained and (records := store.records("train")):
                self._check_resumed(store, records[0].outputs["training"].digest, expected_step, name)
            if answer is not None:
                break
            self.report.kills.append(
                Kill(
                    self._unit_at_work(store), "time" if from_outside else "count", newest_checkpoint(root), waste(root)
                )
            )
        self.report.num_runs += 1
        if (found := exact_artifacts(answer["summary"])) != self.expected:
            different = sorted(key for key in found if found[key] != self.expected[key])
            self.report.faults.append(f"{name}: other artifacts than the undisturbed run: {different}")
        if list((root / "work").glob("*/checkpoint-*")):
            self.report.faults.append(f"{name}: checkpoints were left behind")

    def _check(self, store: Store, name: str) -> None:
        self.report.faults += [f"{name}: {problem.path}: {problem.what}" for problem in store.verify().problems]

    def _check_resumed(self, store: Store, digest: str, expected_step: int, name: str) -> None:
        resumed = json.loads(store.read_text(digest, "training.json"))["resumed_from_step"]
        self.report.num_resumed += resumed is not None
        if (resumed or 0) != expected_step:
            self.report.faults.append(f"{name}: resumed from {resumed} with a checkpoint of step {expected_step}")

    def _unit_at_work(self, store: Store) -> str:
        return next((unit for unit in self.changes if not store.records(unit, limit=1)), "after the last step")


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
