"""Kills whole runs at random moments, many times, and checks that what follows is as if nothing had happened.

    OMP_NUM_THREADS=1 nice python -m benchmarks.soak_kills [--kills 100] [--tracked-kills 40] [--rounds 3] [--seed 1]

Each run is a process, forked from one that has imported everything. It is killed either by itself, just before a random
one of its changes to files, or from outside at a random time. The next run goes on, until it is killed too or has
finished. After every kill all bytes of the store are verified; every finished run must have the artifacts of an
undisturbed one to the bit, and every training must have gone on from the newest complete checkpoint.

With tracking, statements to MLflow's database count as changes, too. After every kill the database must be whole, and after
every finished run it must hold one curve, that of an undisturbed training to the bit, the results, and no run that is open.

In each round, four processes run the same flow on one new store, on a disk and on an S3 server, while a fifth is killed in
its training and a sixth at a random time; and four make and use a new database, after others were killed while they made it.

Prints tables in Markdown, and ends with status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.support.fault_suite import NUM_SHARING, share_s3
from tests.support.forked import AFTERWARDS, fork
from tests.support.killed_runs import KillSeries, Report, Undisturbed
from tests.support.shared_stores import run_together
from tests.support.tracked_runs import create_together


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server in a process of its own; gives its address."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def kill_alone(folder: Path, undisturbed: Undisturbed, options: argparse.Namespace, *, tracking: bool) -> Report:
    """A series of kills of one run after the other."""
    folder.mkdir()
    series = KillSeries(folder, options.seed, undisturbed, tracking=tracking)
    if tracking:
        return series.run(options.tracked_kills)  # these runs are over before most times
    return series.run(options.kills, by_time=options.by_time)


def share(folder: Path, undisturbed: Undisturbed, address: str, moments: random.Random) -> dict[str, list[str]]:
    """One round of several processes at once; gives what was wrong by where they were."""
    found = {}
    kill_after = (moments.uniform(0.2, undisturbed.seconds),)
    for where in ("file", "s3", "database"):
        (folder / where).mkdir(parents=True)
    shared: dict[str, Any] = run_together(
        str(folder / "file" / "store"),
        folder / "file",
        undisturbed,
        num_processes=NUM_SHARING,
        tracking=True,
        kill_trainer=True,
        kill_after=kill_after,
    )
    found["file"] = shared["faults"] + twice(shared["ran"])
    # In a child, because what it sets in its environment is for this round only.
    work = partial(share_s3, address, undisturbed, folder / "s3", name=folder.name, kill_after=kill_after)
    answer = fork(work, folder / "s3.json").wait()
    found["s3"] = ["killed"] if answer is None else answer["faults"] + twice(answer["ran"])
    kill_at = tuple(moments.randint(1, 900) for _ in range(4))
    found["database"] = create_together(folder / "database" / "new", kill_at, NUM_SHARING)
    return found


def twice(ran: dict[str, int]) -> list[str]:
    """Complains of units that ran more than once."""
    return [f"{unit} ran {count} times" for unit, count in ran.items() if count > 1]


def table(report: Report) -> str:
    """Kills by what they hit."""
    lines = ["| killed in | by count of changes | by time | left something half-written |", "|---|---|---|---|"]
    by_unit = Counter(kill.unit for kill in report.kills)
    for unit in sorted(by_unit, key=lambda unit: (unit == AFTERWARDS, -by_unit[unit])):
        kills = [kill for kill in report.kills if kill.unit == unit]
        how = Counter(kill.how for kill in kills)
        lines.append(
            f"| {unit} | {how['count']} | {how['time']} | {sum(kill.num_half_written > 0 for kill in kills)} |"
        )
    last = (
        f"\n{len(report.kills)} kills, {report.num_runs} runs finished after them, {report.num_resumed} of their trainings"
        f" went on from a checkpoint, {report.num_ended} MLflow runs were marked as killed, {len(report.faults)} faults"
    )
    return "\n".join([*lines, last])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--tracked-kills", type=int, default=40, help="with an MLflow log beside each store")
    parser.add_argument("--rounds", type=int, default=3, help="of several processes at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--by-time", type=float, default=0.4, help="share of the kills without tracking that come from outside"
    )
    options = parser.parse_args()
    started = time.monotonic()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "mlflow"))
    print(f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, {packages}\n")
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as place, s3_server() as address:
        root = Path(place)
        undisturbed = Undisturbed(root / "undisturbed")
        for tracking in (False, True):
            title = "With tracking" if tracking else "Without tracking"
            report = kill_alone(root / title, undisturbed, options, tracking=tracking)
            print(f"{title}:\n\n{table(report)}\n", flush=True)
            faults += [f"{title}: {fault}" for fault in report.faults]
        moments = random.Random(options.seed)
        for number in range(options.rounds):
            found = share(root / f"round-{number}", undisturbed, address, moments)
            print(f"round {number + 1}: " + ", ".join(f"{where} {len(wrong)} faults" for where, wrong in found.items()))
            faults += [f"round {number + 1}, {where}: {fault}" for where, wrong in found.items() for fault in wrong]
    print(f"\n{len(faults)} faults, {(time.monotonic() - started) / 60:.1f} minutes")
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
