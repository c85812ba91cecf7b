"""Preparing datasets by other processes: rows of every kind, a flow of the steps up to that one, and Dask workers as hosts."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from artifacts.refs import ArtifactRef
from tasks.load_model import load_model
from tasks.prepare_dataset import prepare_dataset
from tasks.session import Session
from vlm.config import RunConfig


@flow(persist_result=False)
def only_the_dataset(config: RunConfig, rerun_from: str | None = None) -> ArtifactRef:
    """Runs the steps up to the dataset; gives that."""
    session = Session.open(config, rerun_from=rerun_from)
    try:
        checkpoint = load_model(session, return_state=True).result()
        dataset: ArtifactRef = prepare_dataset(session, checkpoint, return_state=True).result()
        return dataset
    finally:
        session.close()


@task(cache_policy=NO_CACHE, persist_result=False)
def say_and_sleep(path: Path) -> None:
    """Says that it is there, and stays."""
    path.touch()
    time.sleep(300)


def picture(number: int, size: tuple[int, int] = (90, 40)) -> bytes:
    """A picture as PNG."""
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).convert("L" if number % 3 else "RGB").save(buffer, "PNG")
    return buffer.getvalue()


def mixed_sources(folder: Path) -> dict[str, Any]:
    """Data settings with sources of several kinds, and rows with all that names, splits and the ledger depend on."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(150):
        (folder / "images" / f"{number}.png").write_bytes(picture(number))
        rows.append({"id": f"{number % 140}", "group": f"{number // 4}", "text": f"line {number}"})
        rows[-1]["image"] = f"images/{number if number % 31 else 1000}.png"
    rows[17]["text"] = ""
    lines = [json.dumps(row) for row in rows]
    lines[50:50] = ["", "{", "[1]"]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "images" / "metadata.csv").write_text(
        "file_name,text,group\n" + "".join(f'{number}.png,"a\n{number}",{number % 9}\n' for number in range(90))
    )
    table = pa.Table.from_pylist(
        [{"image": picture(number), "text": f"parquet {number}", "group": f"{number}"} for number in range(80)]
    )
    pq.write_table(table, folder / "rows.parquet", row_group_size=70)
    sources = [
        str(folder / "rows.jsonl"),
        {"path": str(folder / "images"), "format": "imagefolder", "split": "test"},
        {"path": str(folder / "rows.parquet"), "max_rows": 75},
        {"path": "builtin", "max_rows": 100},
    ]
    return {"sources": sources, "max_dropped_fraction": 0.5}


def slow_source(folder: Path, num_rows: int) -> Path:
    """Rows that take about a tenth of a second each."""
    folder.mkdir()
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    small.resize((2400, 1600)).save(folder / "page.jpg")
    rows = [{"image": "page.jpg", "text": f"line {number}"} for number in range(num_rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def damaged_source(path: Path) -> str:
    """A parquet file whose footer is whole, and a page of which is not."""
    texts = [f"{number} {np.random.default_rng(number).bytes(16).hex()}" for number in range(2000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=500, use_dictionary=False)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1000] = b"\xff" * 1000
    path.write_bytes(content)
    return str(path)


def wait_for(there: Any, seconds: float = 120.0) -> Any:
    """Waits until something is true; gives it."""
    end = time.monotonic() + seconds
    while not (found := there()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return found


@contextmanager
def dask_hosts(folder: Path, count: int = 2) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and workers on this machine, in working directories of their own: hosts in small.

    Args:
        folder: Receives those.
        count: Of workers.

    Yields:
        The scheduler's address, and the workers' processes.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    port = address.partition(":")[2]
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *words: str) -> None:
        (folder / name).mkdir(parents=True)
        with (folder / name / "log").open("wb") as log:
            command = [sys.executable, "-m", "dask", *words, "--no-dashboard"]
            started.append(
                subprocess.Popen(
                    command, cwd=folder / name, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    try:
        start("scheduler", "scheduler", "--host", "127.0.0.1", "--port", port, "--no-show")
        for number in range(count):
            # Without a nanny, which would start another one after a kill.
            start(f"host-{number}", "worker", f"tcp://{address}", "--nthreads", "1", "--no-nanny")
        yield f"tcp://{address}", started[1:]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
