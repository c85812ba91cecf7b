"""Many runs with changing settings in one process on one store: its size, and the process's memory, files and threads.

    OMP_NUM_THREADS=1 nice python -m benchmarks.soak_runs [--runs 50] [--seed 1] [--keep-last 4]

The real flow with MLflow, its steps called as functions, so that what grows is ours and not that of Prefect's server.
Every run changes one or two settings at random; after every run garbage is collected. Prints a table in Markdown, and ends
with status 1 if the second half of the runs grew: memory by over 64 MiB, open files or threads by more than 2, or the
store beyond what its records need.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from artifacts.gc import GcReport, collect
from artifacts.scratch import tree_size
from artifacts.store import Store
from tests.support.forked import settings
from tests.support.local_flow import run_flow_locally
from vlm.config import RunConfig

CHOICES: dict[str, tuple[Any, ...]] = {
    "lora.rank": (2, 4, 8),
    "lora.dropout": (0.0, 0.1),
    "training.max_steps": (2, 3, 4),
    "training.learning_rate": (1e-4, 1e-3),
    "training.seed": (0, 1, 2, 3, 4, 5, 6, 7),
    "training.train_on_prompts": (False, True),
    "generation.max_new_tokens": (4, 6),
    "data.seed": (0, 1, 2),
}
MIB = 1 << 20


@dataclass
class Reading:
    """After one run and the collection that follows.

    Attributes:
        num_ran: Units that were not cached.
        wall_seconds: Of the run.
        resident_bytes: Of the process.
        num_files: Open descriptors.
        num_threads: Of Python.
        before_bytes: Size of the store's folder before the collection.
        after_bytes: And after it.
        needed_bytes: Size of the objects that its records need.
    """

    num_ran: int
    wall_seconds: float
    resident_bytes: int
    num_files: int
    num_threads: int
    before_bytes: int
    after_bytes: int
    needed_bytes: int


def configurations(store: Path, seed: int) -> Iterator[RunConfig]:
    """Settings without end, each one or two changes away from the last."""
    chooser = random.Random(seed)
    chosen = {name: values[0] for name, values in CHOICES.items()}
    while True:
        tree = settings(str(store), tracking=True)
        for name, value in chosen.items():
            section, field = name.split(".")
            if name == "data.seed":
                tree["data"]["split"] = {"seed": value}
            else:
                tree[section][field] = value
        yield RunConfig.model_validate(tree)
        for name in chooser.sample(sorted(CHOICES), chooser.choice((1, 1, 2))):
            chosen[name] = chooser.choice(CHOICES[name])


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run_and_collect(config: RunConfig, root: Path, keep_last: int) -> tuple[Reading, GcReport]:
    started = time.monotonic()
    summary = run_flow_locally(config)
    seconds = time.monotonic() - started
    before = tree_size(root)
    report = collect(Store.open(str(root)), dry_run=False, keep_last=keep_last, grace_seconds=0)
    reading = Reading(
        num_ran=sum(len(step["ran"]) for step in summary["steps"].values()),
        wall_seconds=seconds,
        resident_bytes=resident_bytes(),
        num_files=len(os.listdir("/proc/self/fd")),
        num_threads=threading.active_count(),
        before_bytes=before,
        after_bytes=tree_size(root),
        needed_bytes=report.kept_bytes,
    )
    return reading, report


def growth(readings: list[Reading]) -> list[str]:
    """What the second half of the runs let grow."""
    half = len(readings) // 2
    quarter = max(1, half // 2)
    earlier, later = readings[half : half + quarter], readings[-quarter:]

    def grown(name: str) -> float:
        return statistics.median(getattr(r, name) for r in later) - statistics.median(getattr(r, name) for r in earlier)

    faults = []
    if grown("resident_bytes") > 64 * MIB:
        faults.append(f"memory grew by {grown('resident_bytes') / MIB:.0f} MiB")
    faults += [f"{name} grew by {grown(name)}" for name in ("num_files", "num_threads") if grown(name) > 2]
    # Folders of artifacts are links to objects, so they count twice here; stamps and records are small.
    if readings[-1].after_bytes > 2.2 * readings[-1].needed_bytes + 4 * MIB:
        faults.append(f"the store holds {readings[-1].after_bytes} bytes and needs {readings[-1].needed_bytes}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep-last", type=int, default=4, help="records of each step that a collection keeps")
    options = parser.parse_args()
    readings: list[Reading] = []
    collected = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        for _, config in zip(range(options.runs), configurations(root, options.seed), strict=False):
            reading, report = run_and_collect(config, root, options.keep_last)
            readings.append(reading)
            collected += report.freed_bytes
        log_bytes = (root.parent / "mlflow.db").stat().st_size
        problems = Store.open(str(root)).verify().problems
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "mlflow"))
    print(f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, {packages}\n")
    print(
        "| run | units that ran | seconds | memory MiB | open files | threads | store MiB, before and after collection |"
    )
    print("|---|---|---|---|---|---|---|")
    for number, reading in enumerate(readings, 1):
        if number in (1, 2) or number % 5 == 0:
            print(
                f"| {number} | {reading.num_ran} | {reading.wall_seconds:.1f} | {reading.resident_bytes / MIB:.0f} |"
                f" {reading.num_files} | {reading.num_threads} |"
                f" {reading.before_bytes / MIB:.1f}, {reading.after_bytes / MIB:.1f} |"
            )
    faults = growth(readings) + [f"{problem.path}: {problem.what}" for problem in problems]
    print(
        f"\n{len(readings)} runs, {sum(r.num_ran for r in readings)} units ran, {collected / MIB:.0f} MiB collected, MLflow's"
        f" database {log_bytes / MIB:.1f} MiB, {len(faults)} faults, {sum(r.wall_seconds for r in readings) / 60:.1f} minutes"
    )
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
