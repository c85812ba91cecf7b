"""Several processes that run the same flow on one store at once, and stores whose every file was damaged.

As in `forked`, processes are forked from one that has imported everything.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from artifacts.gc import collect
from artifacts.store import Store
from tests.support.forked import fork, run_to_the_end, settings
from tests.support.killed_runs import Undisturbed
from tests.support.local_flow import exact_artifacts
from tests.support.mlflow_log import Log

# Of a dead holder, in stores without file locks. A run waits so long for a step that another one died in.
_LEASE_SECONDS = 3.0
_SECONDS = 240.0


def run_with_others(url: str, tracking_uri: str | None, start: float, victim: Path | None = None) -> dict[str, Any]:
    """One of several runs, in a child.

    Args:
        url: Of the store.
        tracking_uri: Of MLflow, or None.
        start: When all begin, on the clock of `time.monotonic`.
        victim: Who comes to the training first writes its process id here, and waits to be killed; None lets all live.
    """
    config = settings(url, tracking=tracking_uri is not None)
    config["tracking"] |= {} if tracking_uri is None else {"uri": tracking_uri}
    from vlm.training.train import train_adapter

    lock = functools.partialmethod(Store.lock, lease_seconds=_LEASE_SECONDS)
    training = functools.partial(_train_or_die, train_adapter, victim)
    time.sleep(max(0.0, start - time.monotonic()))
    with mock.patch.object(Store, "lock", lock), mock.patch("vlm.training.train.train_adapter", training):
        return {"summary": run_to_the_end(config)}


def _train_or_die(train: Callable[..., Any], victim: Path | None, *arguments: Any, **options: Any) -> Any:
    """A training; the first one stops here, with the step's lock in its hand and its MLflow run open."""
    if victim is not None:
        with suppress(FileExistsError), victim.open("x") as stream:
            stream.write(f"{os.getpid()}\n")
            stream.flush()
            time.sleep(600)
    return train(*arguments, **options)


def collect_meanwhile(url: str, seconds: float) -> dict[str, Any]:
    """Drops all records but those that name what a run holds, again and again, in a child.

    Args:
        url: Of the store.
        seconds: How long.
    """
    store = Store.open(url)
    end = time.monotonic() + seconds
    rounds, dropped = 0, 0
    while time.monotonic() < end:
        # The grace time is what lies between the making of an artifact and its record.
        report = collect(store, dry_run=False, keep_last=0, grace_seconds=2.0)
        rounds, dropped = rounds + 1, dropped + len(report.records)
        time.sleep(0.05)
    return {"rounds": rounds, "dropped": dropped}


def run_together(
    url: str,
    folder: Path,
    undisturbed: Undisturbed,
    *,
    num_processes: int,
    tracking: bool = False,
    kill_trainer: bool = False,
    kill_after: Sequence[float] = (),
    collect_for: float = 0.0,
) -> dict[str, Any]:
    """Runs the same flow in several processes at once.

    Args:
        url: Of their store.
        folder: Receives their answers, and MLflow's files.
        undisturbed: What each of them must give.
        num_processes: How many are left to finish.
        tracking: Whether all of them log to one new MLflow database.
        kill_trainer: One more process, and the first that comes to the training is killed there while the others wait.
        kill_after: More processes, each killed after so many seconds.
        collect_for: Seconds in which garbage is collected meanwhile.

    Returns:
        ``faults``, empty if all is well; ``ran``, how often each unit ran in processes that finished; ``seconds``;
        ``collector``, what the collection did.
    """
    start = time.monotonic() + 0.5
    uri = f"sqlite:///{folder / 'mlflow.db'}" if tracking else None
    victim = folder / "victim" if kill_trainer else None
    collector = fork(lambda: collect_meanwhile(url, collect_for), folder / "gc.json") if collect_for else None
    children = [
        fork(lambda: run_with_others(url, uri, start, victim), folder / f"answer-{number}.json")
        for number in range(num_processes + kill_trainer + len(kill_after))
    ]
    doomed = children[num_processes + kill_trainer :]
    for child, seconds in zip(doomed, kill_after, strict=True):
        time.sleep(max(0.0, start + seconds - time.monotonic()))
        os.kill(child.pid, signal.SIGKILL)
    if victim is not None:
        _kill(victim)
    answers, faults = [], []
    for number, child in enumerate(children):
        try:
            answers.append(child.wait())
        except (RuntimeError, TimeoutError) as error:
            faults.append(f"process {number}: {error}")
    finished = [answer["summary"] for answer in answers if answer is not None]
    if len(finished) < num_processes:
        faults.append(f"{len(finished)} processes of {num_processes} have finished")
    ran: Counter[str] = Counter()
    for summary in finished:
        ran.update(unit for step in summary["steps"].values() for unit in step["ran"])
        if exact_artifacts(summary) != undisturbed.expected:
            faults.append(f"other artifacts: {exact_artifacts(summary)}")
    if tracking and finished:
        log = Log(folder / "mlflow.db")
        faults += log.check_finished(finished[0], undisturbed.curve)
        if kill_trainer and len(log.with_status("KILLED", nested=False)) != 1:
            faults.append(f"of one killed run MLflow shows {log.status}")
    result = {"faults": faults, "ran": dict(ran), "seconds": time.monotonic() - start}
    return result | {"collector": None if collector is None else collector.wait()}


def _kill(victim: Path) -> None:
    """Kills the process whose id is in a file, when it has been there for long enough that others wait for it."""
    deadline = time.monotonic() + _SECONDS
    while not (victim.exists() and victim.read_text().endswith("\n")):
        if time.monotonic() > deadline:
            raise TimeoutError("no process came to the training")
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(int(victim.read_text()), signal.SIGKILL)


def damage_everything(root: Path, *, silently: bool) -> int:
    """Changes one bit in the middle of every object of a local store, and of every manifest and index record.

    Args:
        root: Of the store.
        silently: As a failing disk does it: objects only, and their times stay as they were.

    Returns:
        Number of damaged files.
    """
    folders = ("objects",) if silently else ("objects", "manifests", "index")
    paths = [path for folder in folders for path in (root / folder).rglob("*") if path.is_file()]
    paths = [path for path in paths if path.stat().st_size]
    for path in paths:
        status = path.stat()
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.chmod(0o644)
        with path.open("r+b") as stream:  # the same file: folders of artifacts link to it
            stream.write(content)
        path.chmod(0o444)
        if silently:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return len(paths)


def run_after_damage(root: Path, folder: Path, expected: dict[str, str], *, silently: bool) -> list[str]:
    """Damages a whole store and runs the flow on it.

    Args:
        root: Of a store that holds a finished run.
        folder: Receives the answer.
        expected: What the run must give.
        silently: As in `damage_everything`.

    Returns:
        What should not be; empty if all is well.
    """
    num_damaged = damage_everything(root, silently=silently)
    store = Store.open(str(root))
    found = [problem for problem in store.verify().problems if not problem.what.endswith("is missing")]
    faults = [] if len(found) == num_damaged else [f"{num_damaged} files were damaged and {len(found)} reported"]
    answer = fork(lambda: run_with_others(str(root), None, 0.0), folder / "answer.json").wait(_SECONDS)
    assert answer is not None
    if exact_artifacts(answer["summary"]) != expected:
        faults.append("other artifacts than before the damage")
    # What nobody reads any more, such as the figures of a training that ran anew, stays as it is until it is asked for.
    store.verify(remove=True)
    again = fork(lambda: run_with_others(str(root), None, 0.0), folder / "answer.json").wait(_SECONDS)
    assert again is not None
    if exact_artifacts(again["summary"]) != expected:
        faults.append("other artifacts after what was damaged had been removed")
    wanted = set(again["summary"]["artifacts"].values())
    for digest in wanted:
        faults += [
            f"{digest[:12]}: {problem}" for problem in store._artifact_problems(store.manifest(digest).ref, full=True)
        ]
    return faults
