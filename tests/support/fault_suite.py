"""All faults of whole runs in one process, whose imports they share: prints what was found as JSON.

python -m tests.support.fault_suite FOLDER SEED NUM_KILLS [S3_ADDRESS]

After two undisturbed runs, everything else goes on in forked processes, three at a time: each of them waits for locks, disks
or processes of its own for about half of its time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.forked import Child, fork
from tests.support.killed_runs import KillSeries, Undisturbed
from tests.support.shared_stores import run_after_damage, run_together
from tests.support.tracked_runs import create_together, interrupt_and_resume

NUM_AT_ONCE = 3
NUM_SHARING = 4
# Kills of tracked runs: as the training begins, when it has checkpoints, as it resumes, after it, and while the end is
# logged, which takes more where another MLflow run must be opened for it.
TRACKED_MOMENTS = (0.1, 0.3, 0.05, 0.6, 0.8, 0.5, 1.2, 1.8)
# A kill without tracking when the training has checkpoints: random ones, of which some go by the machine's pace, may miss that.
RESUMED_MOMENT = 0.45
_SECONDS = 500.0

Phase = Callable[[Path], dict[str, Any]]


def make_bucket(name: str) -> dict[str, str]:
    """Makes a bucket; in a child, because what talks to servers has threads, which no fork survives."""
    import s3fs

    s3fs.S3FileSystem().mkdir(name)
    return {}


def share_s3(
    address: str,
    undisturbed: Undisturbed,
    folder: Path,
    *,
    name: str = "shared-stores",
    kill_after: Sequence[float] = (),
) -> dict[str, Any]:
    """Several processes on one S3 store, and one more that is killed in its training; in a child.

    Args:
        address: Of the server.
        undisturbed: What each of them must give.
        folder: Receives their answers.
        name: Of the bucket, which is made.
        kill_after: As in `run_together`.
    """
    os.environ.update(
        AWS_ENDPOINT_URL=address,
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
        # Downloads and interrupted work lie in the cache, by the address of the store.
        VISION_FINETUNE_CACHE=str(folder / "cache"),
    )
    fork(partial(make_bucket, name), folder / "answer.json").wait()
    return run_together(
        f"s3://{name}/store",
        folder,
        undisturbed,
        num_processes=NUM_SHARING,
        kill_trainer=True,
        kill_after=kill_after,
    )


def phases(root: Path, seed: int, num_kills: int, s3_address: str | None) -> dict[str, Phase]:
    """All that is tried, by name, the longest first; each gets a folder of its own.

    Args:
        root: Receives the undisturbed runs.
        seed: Of the moments of kills.
        num_kills: How many without tracking.
        s3_address: Of a server, if there is one.
    """
    undisturbed = Undisturbed(root / "undisturbed")

    def tracked(folder: Path) -> dict[str, Any]:
        series = KillSeries(folder, seed, undisturbed, tracking=True).run_at(TRACKED_MOMENTS)
        created = create_together(folder / "created", (150, 700), NUM_SHARING)
        interrupted = interrupt_and_resume(folder / "interrupted", undisturbed)
        return {"kills": asdict(series), "created": created, "interrupted": interrupted}

    def kills(folder: Path) -> dict[str, Any]:
        series = KillSeries(folder, seed, undisturbed)
        series.run_at([RESUMED_MOMENT])
        return asdict(series.run(num_kills, by_time=0.2))

    def collected(folder: Path) -> dict[str, Any]:
        # A finished run's store: each of these finds records, which collection would drop.
        url = str(undisturbed.store("tracked"))
        return run_together(url, folder, undisturbed, num_processes=2, collect_for=4.0)

    def file(folder: Path) -> dict[str, Any]:
        url = str(folder / "store")
        return run_together(url, folder, undisturbed, num_processes=NUM_SHARING, tracking=True, kill_trainer=True)

    def damage(name: str, folder: Path, *, silently: bool) -> dict[str, Any]:
        root = undisturbed.copy(name, folder)
        return {"faults": run_after_damage(root, folder, undisturbed.expected, silently=silently)}

    found: dict[str, Phase] = {
        "tracked": tracked,
        "kills": kills,
        "file": file,
        "collected": collected,
        "damage_open": lambda folder: damage("plain", folder, silently=False),
        "damage_silent": lambda folder: damage("plain", folder, silently=True),
    }
    if s3_address is not None:
        found = {"s3": lambda folder: share_s3(s3_address, undisturbed, folder), **found}
    return found


def run_all(root: Path, wanted: dict[str, Phase]) -> dict[str, dict[str, Any]]:
    """Runs phases in processes of their own, some at a time.

    Args:
        root: Receives a folder for each.
        wanted: The phases.

    Returns:
        What each of them gave.
    """
    waiting = deque(wanted.items())
    running: dict[str, Child] = {}
    found: dict[str, dict[str, Any]] = {}
    while waiting or running:
        while waiting and len(running) < NUM_AT_ONCE:
            name, phase = waiting.popleft()
            folder = root / name
            folder.mkdir()
            running[name] = fork(partial(phase, folder), root / f"{name}.json")
        for name, child in list(running.items()):
            if child.has_ended():
                answer = running.pop(name).wait()
                assert answer is not None, f"{name} was killed"
                found[name] = answer
            elif time.monotonic() - child.started > _SECONDS:
                raise TimeoutError(f"{name} did not end within {_SECONDS} s")
        time.sleep(0.05)
    return found


def main() -> None:
    """Runs everything and prints a JSON object with what each phase found."""
    folder, seed, num_kills, *s3_address = sys.argv[1:]
    root = Path(folder)
    wanted = phases(root, int(seed), int(num_kills), s3_address[0] if s3_address else None)
    sys.stdout.write(json.dumps(run_all(root, wanted)) + "\n")


if __name__ == "__main__":
    main()
