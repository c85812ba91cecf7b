"""What a training's data cost the host, and how long the GPU waits for them.

    python -m benchmarks.data_wait [--work lines formula document] [--steps N] [--host-pixels]

For each kind of work of `gpu_step.py`, from a prepared dataset on disk:

1. the host's milliseconds for a sample, in one thread, median over steps of eight: reading the row, and making the batch
   with pixels as bytes and, for comparison, as float32 patches; and what such a batch weighs;
2. on a GPU the milliseconds to move a step's batch there and make its pixels;
3. on a GPU N steps of the real trainer with a live random model (NF4, LoRA r=16 on all linear layers, packed rows): the share
   of the time in which it stood in `next(dataloader)`, by step and as a whole. Losses are logged after every step, so that
   the GPU has nothing left to do when the wait begins: such a wait is idle time. The first steps, in which workers start and
   kernels are compiled, are left out.

`--host-pixels` has workers make float32 patches, as a comparison. `--shape tiny` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.utils import send_to_device

from benchmarks.gpu_step import TINY, WORK, make_rows, synchronize
from benchmarks.live_model import live_model
from benchmarks.random_rows import write_prepared
from benchmarks.real_size import describe
from vlm.config import LoraConfig, TrainingConfig
from vlm.data.prepared import PreparedDataset
from vlm.families.pixels import PixelBytes, finished
from vlm.lora.build import build_adapter
from vlm.processing import Processing
from vlm.training.arguments import num_workers
from vlm.training.collator import VisionDataCollator
from vlm.training.plan import make_plan
from vlm.training.train import train_adapter

SHAPES = {"lines": "qwen2_vl_2b", "formula": "qwen2_vl_2b", "document": "qwen2_5_vl_7b"}
SAMPLES_PER_STEP = 8
NUM_ROWS = 64
LEFT_OUT = 4


def batch_bytes(value: Any) -> int:
    """Bytes of all tensors of a batch."""
    if isinstance(value, PixelBytes):
        return value.data.nbytes + value.levels.nbytes
    if isinstance(value, dict | list | tuple):
        return sum(map(batch_bytes, value.values() if isinstance(value, dict) else value))
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def host_costs(dataset: Path, processing: Processing, config: dict[str, Any]) -> str:
    """One line of the table, and on a GPU the cost of moving a batch."""
    rows = PreparedDataset(dataset, "train")
    collators = {
        as_bytes: VisionDataCollator(processing, model_config=config, pixels_as_bytes=as_bytes)
        for as_bytes in (True, False)
    }
    seconds: dict[Any, list[float]] = {"read": [], True: [], False: [], "moved": []}
    weights = {}
    on_gpu = torch.cuda.is_available()
    for first in range(0, NUM_ROWS, SAMPLES_PER_STEP):
        started = time.perf_counter()
        step = [rows[number] for number in range(first, first + SAMPLES_PER_STEP)]
        seconds["read"].append(time.perf_counter() - started)
        for as_bytes, collator in collators.items():
            started = time.perf_counter()
            batch = collator.pack(step)
            seconds[as_bytes].append(time.perf_counter() - started)
            weights[as_bytes] = batch_bytes(batch)
            if as_bytes and on_gpu:
                pinned = torch.utils.data._utils.pin_memory.pin_memory(batch)
                synchronize()
                started = time.perf_counter()
                finished(send_to_device(pinned, torch.device("cuda"), non_blocking=True), torch.bfloat16)
                synchronize()
                seconds["moved"].append(time.perf_counter() - started)
    read, as_bytes_ms, as_floats_ms = (
        1000 * statistics.median(seconds[key]) / SAMPLES_PER_STEP for key in ("read", True, False)
    )
    moved = f"{1000 * statistics.median(seconds['moved']):.2f}" if on_gpu else "–"
    heavy, light = (weights[key] / 1e6 / SAMPLES_PER_STEP for key in (False, True))
    return f"{read:.2f} | {as_bytes_ms:.2f} | {as_floats_ms:.2f} | {light:.2f} | {heavy:.2f} | {moved}"


def trained(loaded: Any, dataset: Path, steps: int, folder: Path, *, host_pixels: bool) -> str:
    """Trains and gives the rest of the line."""
    checkpoint = loaded.checkpoint_dir
    (checkpoint / "model").mkdir()
    shutil.copyfile(checkpoint / "config.json", checkpoint / "model" / "config.json")
    num_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    description = {"family": loaded.family.model_type, "num_parameters": num_parameters, "source": "random weights"}
    (checkpoint / "checkpoint.json").write_text(json.dumps(description))
    # The plan reads nothing of the weights but their size.
    with (checkpoint / "model" / "model.safetensors").open("wb") as file:
        file.truncate(sum(value.nbytes for value in loaded.model.state_dict().values()))
    build_adapter(loaded, LoraConfig(rank=16, alpha=16), folder / "initial")
    training = TrainingConfig(
        max_steps=steps,
        batch_size=SAMPLES_PER_STEP,
        gradient_accumulation=1,
        log_every_steps=1,
        checkpoint_every_steps=None,
        evaluate_every_steps=None,
    )
    make_plan(
        dataset, checkpoint, folder / "initial", training, folder / "plan", device=loaded.device, dtype=loaded.dtype
    )
    with ExitStack() as stack:
        if host_pixels:
            stack.enter_context(
                mock.patch.object(VisionDataCollator, "_with_pixels", lambda self, batch: finished(batch))
            )
        train_adapter(
            loaded, folder / "initial", dataset, folder / "plan", training, folder / "out", work_dir=folder / "work"
        )
    text = (folder / "out" / "training" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()][LEFT_OUT:]
    # The first line after those left out counts from the log before it, as all others do.
    whole = [SAMPLES_PER_STEP / line["samples_per_second"] for line in lines]
    shares = [line["data_wait_share"] for line in lines]
    overall = sum(share * second for share, second in zip(shares, whole, strict=True)) / sum(whole)
    return (
        f"{statistics.median(whole):.3f} | {statistics.median(shares):.2%} | {max(shares):.2%} | {overall:.2%}"
        f" | {SAMPLES_PER_STEP / statistics.median(whole):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--shape", choices=[*sorted(set(SHAPES.values())), "tiny"], help="in place of the work's own")
    parser.add_argument("--steps", type=int, default=20, help="of the trainer")
    parser.add_argument("--host-pixels", action="store_true", help="float32 patches from the workers")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(1)
    trains = on_gpu or options.shape == "tiny"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "accelerate"))
    device = torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU"
    workers = num_workers() if on_gpu else 0
    print(
        f"{device}, {len(os.sched_getaffinity(0))} cores, {workers} workers; {versions}; Python {platform.python_version()};"
        f" {SAMPLES_PER_STEP} samples a step\n"
    )
    print(
        "| work | model | read, ms/sample | batch as bytes, ms/sample | as float32, ms/sample | MB/sample as bytes"
        " | as float32 | move and make, ms/step | step, s | waiting, median | most | overall | samples/s |"
    )
    print("|---" * 13 + "|")
    for work in options.work:
        name = options.shape or SHAPES[work]
        tiny = name == "tiny"
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            loaded, size, overlay = None, "qwen2_5_vl_3b" if tiny else name, TINY if tiny else None
            if trains:
                loaded = live_model(size, device="cuda" if on_gpu else "cpu", overlay=overlay)
                processing, config = loaded.processing, loaded.model.config.to_dict()
            else:
                described = describe(size, folder / "described", config=overlay)
                processing, config = Processing.from_dir(described), json.loads((described / "config.json").read_text())
            dataset = write_prepared(folder / "dataset", "train", make_rows(WORK[work], NUM_ROWS, processing))
            line = host_costs(dataset, processing, config)
            rest = "– | – | – | – | –"
            if trains:
                rest = trained(loaded, dataset, options.steps, folder, host_pixels=options.host_pixels)
            del loaded
            print(f"| {work} | {name} | {line} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
