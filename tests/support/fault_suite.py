"""All faults of whole runs in one process, whose imports they share: prints what was found as JSON.

python -m tests.support.fault_suite FOLDER SEED NUM_KILLS [S3_ADDRESS]
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from tests.support.killed_runs import KillSeries, fork
from tests.support.shared_stores import run_after_damage, run_together

BUCKET = "shared-stores"


def make_bucket() -> dict[str, str]:
    """Makes the bucket; in a child, because what talks to servers has threads, which no fork survives."""
    import s3fs

    s3fs.S3FileSystem().mkdir(BUCKET)
    return {}


def main() -> None:
    """Runs everything and prints a JSON object with ``kills``, ``together`` and ``damage``."""
    folder, seed, num_kills, *s3_address = sys.argv[1:]
    root = Path(folder)
    series = KillSeries(root, int(seed))
    kills = series.run(int(num_kills), by_time=0.2)
    expected = series.expected

    def together(name: str, url: str | None = None, **options: object) -> dict[str, object]:
        own = root / name
        own.mkdir()
        return run_together(url or str(own / "store"), own, expected, **options)  # type: ignore[arg-type]

    found = {
        "kills": asdict(kills),
        # One of them dies in whatever it is at, perhaps holding a lock that the others wait for.
        "together": {"file": together("file", num_processes=3, tracking=True, kill_after=(1.5,))},
        "damage": {
            "silent": run_after_damage(series.root("again"), root, expected, silently=True),
            "open": run_after_damage(series.root("undisturbed"), root, expected, silently=False),
        },
    }
    # A finished run's store: each of these finds records, which collection would drop.
    url = str(series.root("undisturbed"))
    found["together"]["collected"] = together("collected", url, num_processes=2, collect_for=4.0)
    for address in s3_address:
        os.environ.update(
            AWS_ENDPOINT_URL=address,
            AWS_ACCESS_KEY_ID="testing",
            AWS_SECRET_ACCESS_KEY="testing",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_EC2_METADATA_DISABLED="true",
        )
        fork(make_bucket, root / "answer.json").wait()
        found["together"]["s3"] = together("s3", f"s3://{BUCKET}/store", num_processes=2)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
