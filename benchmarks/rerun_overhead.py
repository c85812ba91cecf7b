"""How much a rerun with nothing to do costs over an empty Prefect flow of seven tasks, and what --plan takes.

    python benchmarks/rerun_overhead.py [--runs 5] [-- SETTINGS of the pipeline]

Both are whole processes, in turn (A B A B …), each with its own fresh Python and the embedded Prefect server; the
pipeline's first run, which fills the store, is not counted. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

EMPTY_FLOW = """
import os
from flows.cli import QUIET
for name, value in QUIET.items():
    os.environ.setdefault(name, value)
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
def make(number):
    return task(name=f"step-{number}", cache_policy=NO_CACHE, persist_result=False)(lambda: number)
tasks = [make(number) for number in range(7)]
@flow(persist_result=False)
def empty():
    for step in tasks:
        step(return_state=True)
empty()
"""


def seconds(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command} failed:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("settings", nargs="*", help="settings of the pipeline, after --")
    options = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"PREFECT_HOME": f"{scratch}/prefect", "PYTHONPATH": str(root)}
        store = ["--runtime.store", f"{scratch}/store"]
        pipeline = [sys.executable, "-m", "flows.vision_finetune", *store, *options.settings]
        empty = [sys.executable, "-c", EMPTY_FLOW]
        first = seconds(pipeline, environment)
        times: dict[str, list[float]] = {"empty flow": [], "rerun": [], "--plan": []}
        for _ in range(options.runs):
            times["empty flow"].append(seconds(empty, environment))
            times["rerun"].append(seconds(pipeline, environment))
            times["--plan"].append(seconds([*pipeline, "--plan"], environment))
    ratios = [rerun / baseline for rerun, baseline in zip(times["rerun"], times["empty flow"], strict=True)]
    print(
        f"prefect {version('prefect')}, Python {sys.version.split()[0]}, {os.cpu_count()} cores; first run {first:.1f} s\n"
    )
    print("| command | median s | min s | max s |\n|---|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    print(
        f"\nrerun / empty flow, pair by pair: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
