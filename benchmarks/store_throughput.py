"""How fast a checkpoint is published, against ``sha256sum`` and ``cp`` on the same files and disk.

    python benchmarks/store_throughput.py --size-gb 4 --result benchmarks/results/store_throughput_cpu_<date>.md

Every figure is the median of ``--repeats`` rounds; each round measures all rows once, so that a change of the
machine's load meets all of them. The files are random bytes, in the page cache when a row starts; what the row
before has written is flushed to the disk first. ``cp`` and the store do not flush.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from artifacts import Store, objects
from artifacts.hashing import NUM_WORKERS

NUM_SHARDS = 4


def write_checkpoint(folder: Path, size_bytes: int) -> None:
    folder.mkdir()
    for shard in range(NUM_SHARDS):
        with open(folder / f"model-{shard + 1:05}-of-{NUM_SHARDS:05}.safetensors", "wb") as stream:
            left = size_bytes // NUM_SHARDS
            while left > 0:
                left -= stream.write(os.urandom(min(left, 64 << 20)))
    (folder / "config.json").write_text('{"model_type": "benchmark"}')


def seconds(work: Callable[[], object]) -> float:
    os.sync()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure(checkpoint: Path, place: Path) -> dict[str, float]:
    """Runs every row once, and leaves the checkpoint as it was."""
    files = [str(path) for path in sorted(checkpoint.iterdir())]
    times = {"sha256sum": seconds(lambda: run("sha256sum", *files))}
    times["openssl"] = seconds(lambda: run("openssl", "dgst", "-sha256", *files))
    times["cp"] = seconds(lambda: run("cp", "-r", str(checkpoint), str(place / "copy")))
    shutil.rmtree(place / "copy")

    def fresh_store() -> Store:
        objects._verified.clear()
        shutil.rmtree(place / "store", ignore_errors=True)
        return Store.open(str(place / "store"))

    store = fresh_store()
    times["publish, copy"] = seconds(lambda: store.publish(checkpoint, kind="checkpoint", consume=False))

    store = fresh_store()
    times["publish, move"] = seconds(lambda: store.publish(checkpoint, kind="checkpoint", consume=True))
    ref = next(store.digests())
    manifest = store.manifest(ref)
    store.record("load_model", "0" * 64, {}, {"checkpoint": manifest.ref})

    times["lookup"] = seconds(lambda: store.lookup("load_model", "0" * 64))
    objects._verified.clear()  # as in a new process
    times["lookup, new process"] = seconds(lambda: store.lookup("load_model", "0" * 64))
    times["materialize, new process"] = seconds(lambda: store.materialize(ref))
    times["materialize, again"] = seconds(lambda: store.materialize(ref))

    for entry in manifest.files:
        path = checkpoint / entry.path
        os.rename(place / "store" / objects.object_path(entry.sha256), path)
        path.chmod(0o644)
    shutil.rmtree(place / "store")
    return times


def report(medians: dict[str, float], size_bytes: int, arguments: list[str], repeats: int) -> str:
    def row(title: str, name: str, baseline: float | None = None) -> str:
        taken = medians[name]
        speed = f"{size_bytes / taken / 1e6:,.0f} MB/s" if taken > 0.05 else "–"
        shown = f"{taken:.2f} s" if taken > 0.05 else f"{taken * 1000:.1f} ms"
        return f"| {title} | {shown} | {speed} | {f'{baseline / taken:.0%}' if baseline else ''} |"

    plain_move, plain_copy = medians["sha256sum"], medians["sha256sum"] + medians["cp"]
    fast_move, fast_copy = medians["openssl"], medians["openssl"] + medians["cp"]
    lines = [
        f"# Store throughput, CPU, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "",
        f"Publishing a checkpoint of {size_bytes / 1e9:.1f} GB in {NUM_SHARDS} shards; median of {repeats} rounds; "
        "files in the page cache; one disk.",
        "",
        f"- Command: `python benchmarks/store_throughput.py {' '.join(arguments)}`",
        f"- Python {platform.python_version()}, {hash_library()}, {coreutils()}",
        f"- {processor()}, {os.cpu_count()} cores; {NUM_WORKERS} files hashed at a time; {platform.system()} {platform.release()}",
        f"- Load average of the machine over the last 15 minutes: {os.getloadavg()[2]:.1f} (this benchmark alone makes 1 to 2)",
        "",
        "| what | time | speed | against `sha256sum` (+ `cp`) |",
        "|---|---|---|---|",
        row("`sha256sum`", "sha256sum"),
        row("`openssl dgst -sha256`", "openssl"),
        row("`cp -r`", "cp"),
        row("publish, `consume=True` (hash, then rename)", "publish, move", plain_move),
        row("publish, `consume=False` (copy while hashing)", "publish, copy", plain_copy),
        row("`materialize` in a new process (every byte verified)", "materialize, new process", plain_move),
        row("`materialize` again in the same process", "materialize, again"),
        row("`lookup` in a new process (sizes and stamps)", "lookup, new process"),
        row("`lookup` in the same process", "lookup"),
        "",
        f"Against the faster `openssl` instead of `sha256sum`: publish with `consume=True` {fast_move / medians['publish, move']:.0%}, "
        f"with `consume=False` {fast_copy / medians['publish, copy']:.0%}.",
        "",
    ]
    return "\n".join(lines)


def hash_library() -> str:
    import ssl

    return ssl.OPENSSL_VERSION


def coreutils() -> str:
    return subprocess.run(["sha256sum", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description="Publishing speed of the artifact store.")
    parser.add_argument("--size-gb", type=float, default=4.0, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--place", type=Path, default=None, help="folder on the disk to measure (default: a temporary one)"
    )
    parser.add_argument(
        "--result", type=Path, default=None, help="where to write the report (default: standard output)"
    )
    options = parser.parse_args()
    size_bytes = int(options.size_gb * 1e9)
    with tempfile.TemporaryDirectory(dir=options.place, prefix="store-throughput-") as folder:
        free = shutil.disk_usage(folder).free
        if free < 2.2 * size_bytes:
            sys.exit(
                f"{folder} has {free / 1e9:.1f} GB free; this needs {2.2 * size_bytes / 1e9:.1f} GB. Use --place or --size-gb."
            )
        checkpoint = Path(folder, "checkpoint")
        write_checkpoint(checkpoint, size_bytes)
        rounds = []
        for number in range(options.repeats):
            rounds.append(measure(checkpoint, Path(folder)))
            print(
                f"round {number + 1}: " + ", ".join(f"{name} {taken:.2f} s" for name, taken in rounds[-1].items()),
                file=sys.stderr,
            )
    medians = {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}
    text = report(medians, size_bytes, sys.argv[1:], options.repeats)
    if options.result is None:
        print(text)
    else:
        options.result.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
