"""Speed and memory of step 3, against bare Pillow on all cores.

    python benchmarks/prepare_dataset.py [--data ../shared/data] [--workers N]
    python benchmarks/prepare_dataset.py --processes N     several processes against threads
    python benchmarks/prepare_dataset.py --dask tcp://host:port

Two loads from the SROIE receipts: whole pages (decoding dominates) and single lines (everything else does). The yardstick only
decodes and resizes: a pool of processes, one per core, bytes already in memory. Ours reads the parquet file, validates, tokenises
with the built-in model's processor and writes the dataset as well.

With `--processes` or `--dask`, parts are prepared through Prefect's task runners as in a run, against threads in this process;
workers are started once, and both sides take turns.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))


def make_rows(data: Path, name: str, num_rows: int, target: Path) -> Path:
    """A parquet file of `num_rows` rows, those of the real set over and over with ids of their own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(data / name / "train.parquet", columns=["id", "group", "image", "prompt", "text"]).to_pylist()
    path = target / f"{name}-{num_rows}.parquet"
    schema = pa.Table.from_pylist(rows[:1]).schema
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, 500):
            part = [{**rows[n % len(rows)], "id": f"{n}"} for n in range(start, min(start + 500, num_rows))]
            writer.write_table(pa.Table.from_pylist(part, schema))
    return path


def open_processing(folder: Path) -> Any:
    from vlm.builtin import make_builtin_checkpoint
    from vlm.processing import Processing

    if not (folder / "config.json").exists():
        make_builtin_checkpoint(folder)
    return Processing.from_dir(folder)


def decode_and_resize(work: list[tuple[bytes, tuple[int, int]]]) -> int:
    import numpy as np
    from PIL import Image

    total = 0
    for data, size in work:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        total += np.asarray(image.resize(size, Image.Resampling.BICUBIC)).nbytes
    return total


def timed(work: list[tuple[bytes, tuple[int, int]]]) -> float:
    start = time.process_time()
    decode_and_resize(work)
    return time.process_time() - start


def bare_speed(path: Path, processing: Any, num_processes: int) -> tuple[float, float]:
    """Rows per second on all cores, and processor milliseconds per row."""
    import pyarrow.parquet as pq
    from PIL import Image

    work = []
    for row in pq.read_table(path, columns=["image"]).to_pylist():
        data = row["image"]["bytes"]
        width, height = Image.open(io.BytesIO(data)).size
        work.append((data, processing.target_size(height, width)[::-1]))
    chunks = [work[start : start + 8] for start in range(0, len(work), 8)]
    with multiprocessing.get_context("fork").Pool(num_processes) as pool:
        pool.map(decode_and_resize, chunks[:num_processes])
        start = time.perf_counter()
        seconds = pool.map(timed, chunks, chunksize=1)
        return len(work) / (time.perf_counter() - start), 1000 * sum(seconds) / len(work)


def our_speed(path: Path, processing: Any, num_workers: int, target: Path) -> tuple[float, float]:
    """The same of a whole preparation."""
    from vlm.config.data import DataConfig
    from vlm.data.prepare import prepare_dataset

    data = DataConfig.model_validate({"sources": [{"path": str(path), "split": "train"}]})
    with tempfile.TemporaryDirectory(dir=target) as output:
        start, start_cpu = time.perf_counter(), time.process_time()
        summary = prepare_dataset(data, processing, Path(output), num_workers=num_workers)
        seconds, seconds_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    assert summary.num_dropped == 0
    return summary.num_rows_in / seconds, 1000 * seconds_cpu / summary.num_rows_in


def peak_memory_mib(path: Path, folder: Path, num_workers: int) -> tuple[float, float]:
    """Resident memory of a process of its own: before the first row, and at its peak from then on."""
    command = [sys.executable, __file__, "--memory-of", str(path), "--folder", str(folder)]
    answer = subprocess.run(
        [*command, "--workers", str(num_workers)], capture_output=True, text=True, check=True
    ).stdout
    before, peak = json.loads(answer)
    return before / 1024, peak / 1024


def digest(folder: Path) -> str:
    """Of all files and their names."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(path.relative_to(folder).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


class Sides:
    """Threads of this process, and workers elsewhere."""

    def __init__(self, path: Path, processor_dir: Path, folder: Path, workers: Any, num_threads: int) -> None:
        from vlm.config.data import DataConfig

        self.data = DataConfig.model_validate({"sources": [{"path": str(path), "split": "train"}]})
        self.processor_dir, self.folder, self.workers, self.num_threads = processor_dir, folder, workers, num_threads
        self.join_seconds = 0.0

    def in_threads(self, output: Path) -> None:
        """Prepares as by default."""
        from vlm.data.prepare import prepare_dataset
        from vlm.processing import Processing

        prepare_dataset(self.data, Processing.from_dir(self.processor_dir), output, num_workers=self.num_threads)

    def elsewhere(self, output: Path) -> None:
        """Has the workers prepare."""
        from vlm.data.parts import prepare_in_parts

        def run(parts: Any) -> Any:
            for result in self.workers.run(parts):
                start = time.thread_time()
                yield result
                self.join_seconds += time.thread_time() - start

        self.join_seconds = 0.0
        with tempfile.TemporaryDirectory(dir=self.folder) as exchange, tempfile.TemporaryDirectory() as scratch:
            prepare_in_parts(self.data, self.processor_dir, output, run, exchange=exchange, scratch=Path(scratch))

    def timed(self, prepare: Any) -> tuple[float, str]:
        """Seconds, and the digest of what came out."""
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            start = time.perf_counter()
            prepare(Path(output))
            return time.perf_counter() - start, digest(Path(output))


def compare_with_threads(options: argparse.Namespace) -> None:
    from tasks.parts import workers_for
    from vlm.config.data import PreparationConfig

    how = {"dask_scheduler": options.dask} if options.dask else {"num_processes": options.processes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "processor").mkdir()
        open_processing(folder / "processor")
        for weights in (folder / "processor").glob("*.safetensors"):
            weights.unlink()
        start = time.perf_counter()
        with workers_for(PreparationConfig.model_validate(how)) as workers:
            few = Sides(make_rows(options.data, "sroie_lines", 20, folder), folder / "processor", folder, workers, 0)
            few.timed(few.elsewhere)
            print(f"{platform.machine()}, {os.cpu_count()} cores, {how}, {workers.num_workers()} at once, against")
            print(f"{options.workers} threads; best of {options.repeats}; start {time.perf_counter() - start:.1f} s\n")
            print(
                "| rows | threads, rows/s | elsewhere, rows/s | ratio | joining, CPU ms/row | same bytes | machine load |"
            )
            print("|---|---|---|---|---|---|---|")
            for kind, num_rows in (("sroie_kie", 1600), ("sroie_lines", 6000), ("sroie_lines", 20_000)):
                path = make_rows(options.data, kind, num_rows, folder)
                sides = Sides(path, folder / "processor", folder, workers, options.workers)
                threads, others, joins = [], [], []
                for _ in range(options.repeats):
                    threads.append(sides.timed(sides.in_threads))
                    others.append(sides.timed(sides.elsewhere))
                    joins.append(1000 * sides.join_seconds / num_rows)
                same = len({found for _, found in threads + others}) == 1
                speeds = [num_rows / min(seconds for seconds, _ in side) for side in (threads, others)]
                figures = f"{speeds[0]:.0f} | {speeds[1]:.0f} | {speeds[1] / speeds[0]:.2f} | {min(joins):.3f}"
                print(f"| {kind}, {num_rows} | {figures} | {same} | {os.getloadavg()[0]:.1f} |", flush=True)


def memory_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared" / "data")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5, help="both sides in turn; the best of each counts")
    parser.add_argument("--processes", type=int, help="compare so many processes with threads")
    parser.add_argument("--dask", help="compare the workers of this scheduler with threads")
    parser.add_argument("--memory-of", type=Path)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.processes or options.dask:
        compare_with_threads(options)
        return
    if options.memory_of is not None:
        processing = open_processing(options.folder)
        our_speed(options.memory_of.with_name("warm.parquet"), processing, options.workers, options.folder)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = memory_kib("VmRSS")
        our_speed(options.memory_of, processing, options.workers, options.folder)
        print(json.dumps([before, memory_kib("VmHWM")]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processing = open_processing(folder)
        print(f"{platform.machine()}, {os.cpu_count()} cores, {options.workers} workers; best of {options.repeats}\n")
        print("| rows | bare Pillow, rows/s | ours, rows/s | share | bare, CPU ms/row | ours | share | machine load |")
        print("|---|---|---|---|---|---|---|---|")
        for kind, num_rows in (("sroie_kie", 400), ("sroie_lines", 6000), ("sroie_lines", 20_000)):
            path = make_rows(options.data, kind, num_rows, folder)
            bare, ours = [], []
            for _ in range(options.repeats):
                bare.append(bare_speed(path, processing, options.workers))
                ours.append(our_speed(path, processing, options.workers, folder))
            speeds = [max(speed for speed, _ in side) for side in (bare, ours)]
            costs = [min(cost for _, cost in side) for side in (bare, ours)]
            wall = f"{speeds[0]:.0f} | {speeds[1]:.0f} | {speeds[1] / speeds[0]:.0%}"
            cpu = f"{costs[0]:.2f} | {costs[1]:.2f} | {costs[0] / costs[1]:.0%}"
            print(f"| {kind}, {num_rows} | {wall} | {cpu} | {os.getloadavg()[0]:.1f} |", flush=True)
        print("\n| rows of sroie_lines | peak memory before, MiB | after, MiB |\n|---|---|---|")
        make_rows(options.data, "sroie_lines", 20, folder).rename(folder / "warm.parquet")
        for num_rows in (1000, 20_000):
            before, after = peak_memory_mib(
                make_rows(options.data, "sroie_lines", num_rows, folder), folder, options.workers
            )
            print(f"| {num_rows} | {before:.0f} | {after:.0f} |", flush=True)


if __name__ == "__main__":
    main()
