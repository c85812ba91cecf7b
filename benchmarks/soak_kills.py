"""Kills whole runs at random moments, many times, and checks that what follows is as if nothing had happened.

    OMP_NUM_THREADS=1 nice python -m benchmarks.soak_kills [--kills 100] [--seed 1] [--by-time 0.4] [--tracking]

Each run is a process, forked from one that has imported everything. It is killed either by itself, just before a random
one of its changes to the store's files, or from outside at a random time. The next run goes on, until it is killed too or
has finished. After every kill all bytes of the store are verified; every finished run must have the artifacts of an
undisturbed one to the bit, and every training must have gone on from the newest complete checkpoint. Prints a table in
Markdown, and ends with status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tests.support.killed_runs import KillSeries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--by-time", type=float, default=0.4, help="share of the kills that come from outside")
    parser.add_argument("--tracking", action="store_true", help="with an MLflow log beside each store")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        series = KillSeries(Path(folder), options.seed, tracking=options.tracking)
        report = series.run(options.kills, by_time=options.by_time)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    print(f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, {packages}\n")
    print("| killed in | by count of file changes | by time | left something half-written |\n|---|---|---|---|")
    for unit in (*series.changes, "after the last step"):
        kills = [kill for kill in report.kills if kill.unit == unit]
        how = Counter(kill.how for kill in kills)
        print(f"| {unit} | {how['count']} | {how['time']} | {sum(kill.num_half_written > 0 for kill in kills)} |")
    print(
        f"\n{len(report.kills)} kills, {report.num_runs} runs finished after them, {report.num_resumed} of their trainings"
        f" went on from a checkpoint, {len(report.faults)} faults, {(time.monotonic() - started) / 60:.1f} minutes"
    )
    for fault in report.faults:
        print(f"FAULT {fault}")
    return 1 if report.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
