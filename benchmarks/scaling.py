"""What more GPUs give: the same training on 1, 2, 4 … processes of this machine, as ratios within one run.

    python -m benchmarks.scaling [--work formula] [--shape qwen2_5_vl_7b] [--processes 1 2 4] [--strategies ddp fsdp2]
                                 [--samples 32] [--steps 20] [--full]

Random weights of a real shape in NF4, LoRA r=16 on all linear layers (`--full`: 16-bit weights, all parts trained whole), packed
rows of random pixels. Every line is a whole training in processes of its own, started as the train task starts them, over
the same rows in the same steps of `--samples` conversations: strong scaling. For weak scaling, give `--samples-per-process`.
The first steps, in which workers start, kernels are compiled and graphs are recorded, are left out (`--left-out`).

- samples/s, tokens/s: medians over steps; speed-up: of samples/s: over the first line; efficiency: speed-up over the number of processes.
- balance: the busiest process's tokens over the mean, as dealt; what imbalance alone costs.
- planned, peak: GPU memory of process 0, as step 4 expected it and as PyTorch allocated it.
- loss: of the last step; the same in all lines to rounding, or something is wrong.

`--shape tiny` tries the script itself on a CPU, with two processes over gloo: more of them than cores only get slower.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import torch

from benchmarks.gpu_step import TINY, WORK, make_rows
from benchmarks.random_rows import write_prepared
from benchmarks.real_size import REAL_SIZES, make_checkpoint
from vlm.config import (
    DistributedConfig,
    EvaluationConfig,
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    TrainingConfig,
)
from vlm.data.prepared import PreparedDataset
from vlm.errors import ResourceError
from vlm.loading.build import build_checkpoint
from vlm.loading.checkpoint import load_checkpoint
from vlm.lora.build import build_adapter
from vlm.training.distributed.dealing import dealt_packs
from vlm.training.distributed.job import Job
from vlm.training.distributed.launch import train_on_processes
from vlm.training.plan import BATCHES_FILE, make_plan

ALL_PARTS = ("vision", "projector", "language")


def balance(plan_dir: Path, rows: PreparedDataset, num_processes: int) -> float:
    """The busiest process's tokens over the mean, summed over steps."""
    lengths, visual = np.asarray(rows.num_tokens), np.asarray(rows.num_visual_tokens)
    busiest = total = 0
    batches = datasets.Dataset.from_file(str(plan_dir / BATCHES_FILE))
    for _, group in itertools.groupby(batches, key=lambda batch: batch["step"]):
        dealt = dealt_packs([batch["rows"] for batch in group], lengths, visual, num_processes)
        loads = [sum(int(lengths[part].sum()) for part in parts) for parts in dealt]
        busiest, total = busiest + max(loads), total + sum(loads)
    return busiest * num_processes / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORK, default="formula")
    parser.add_argument("--shape", choices=[*REAL_SIZES, "tiny"], default="qwen2_vl_2b")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--strategies", nargs="+", choices=("ddp", "fsdp2"), default=["ddp"])
    parser.add_argument("--samples", type=int, default=32, help="of a step, over all processes")
    parser.add_argument("--samples-per-process", type=int, help="in place of --samples")
    parser.add_argument("--layers", type=int, help="of the language model, for fewer than its shape has")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--left-out", type=int, default=4, help="first steps that do not count")
    parser.add_argument("--metrics", type=Path, help="folder for what every training logged, step by step")
    parser.add_argument("--full", action="store_true", help="full fine-tuning in place of an adapter")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    tiny = options.shape == "tiny"
    fewer = {"text_config": {"num_hidden_layers": options.layers}} if options.layers else None
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"))
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        source = make_checkpoint(
            "qwen2_5_vl_3b" if tiny else options.shape, folder / "source", config=TINY if tiny else fewer
        )
        quantization = "none" if options.full else "nf4"
        (folder / "checkpoint").mkdir()
        build_checkpoint(
            ModelConfig(name=str(source), quantization=quantization), folder / "checkpoint", device=device, dtype=dtype
        )
        shutil.rmtree(source)
        loaded = load_checkpoint(folder / "checkpoint", device=device)
        lora = LoraConfig(full_finetuning=ALL_PARTS) if options.full else LoraConfig(rank=16, alpha=16)
        build_adapter(loaded, lora, folder / "initial")
        most = max(options.samples, max(options.processes) * (options.samples_per_process or 0))
        rows = make_rows(WORK[options.work], 2 * most, loaded.processing)
        dataset = write_prepared(folder / "dataset", "train", rows)
        del loaded, rows
        if device == "cuda":
            torch.cuda.empty_cache()
        print(
            f"{name}, {len(os.sched_getaffinity(0))} cores; {versions}; Python {platform.python_version()}; {options.shape}"
            f"{f' of {options.layers} layers' if options.layers else ''},"
            f" {options.work}, {'full fine-tuning' if options.full else 'LoRA'}, {options.steps} steps\n"
        )
        print(
            "| processes | strategy | samples/step | samples/s | tokens/s | speed-up | efficiency | balance | planned, GiB | peak, GiB | loss | whole, s |"
        )
        print("|---" * 12 + "|")
        first = None
        for strategy, number in itertools.product(options.strategies, options.processes):
            if number == 1 and strategy != options.strategies[0]:
                continue
            samples = options.samples_per_process * number if options.samples_per_process else options.samples
            training = TrainingConfig(
                max_steps=options.steps,
                batch_size=samples,
                gradient_accumulation=1,
                log_every_steps=1,
                checkpoint_every_steps=None,
                optimizer="adamw" if options.full else "auto",
                # One process goes through the same launch, with nobody to sum with.
                distributed=DistributedConfig(num_processes=number, strategy=strategy if number > 1 else "ddp"),
            )
            here = folder / f"{strategy}-{number}"
            try:
                plan = make_plan(
                    dataset,
                    folder / "checkpoint",
                    folder / "initial",
                    training,
                    here / "plan",
                    device=device,
                    dtype=dtype,
                    num_spread=number if strategy == "fsdp2" else 1,
                )
            except ResourceError as error:
                print(
                    f"| {number} | {strategy if number > 1 else '–'} | {samples} | does not fit: {error} |", flush=True
                )
                continue
            started = time.perf_counter()
            summary = train_on_processes(
                Job(
                    checkpoint_dir=folder / "checkpoint",
                    digest=None,
                    adapter_dir=folder / "initial",
                    dataset_dir=dataset,
                    plan_dir=here / "plan",
                    output_dir=here / "out",
                    work_dir=here / "work",
                    events_dir=here / "events",
                    device=device,
                    num_processes=number,
                    training=training,
                    generation=GenerationConfig(),
                    evaluation=EvaluationConfig(),
                )
            )
            whole = time.perf_counter() - started
            assert summary is not None
            text = (here / "out/training/metrics.jsonl").read_text()
            if options.metrics is not None:
                options.metrics.mkdir(parents=True, exist_ok=True)
                (options.metrics / f"{options.shape}-{options.work}-{strategy}-{number}.jsonl").write_text(text)
            lines = [json.loads(line) for line in text.splitlines()]
            speed, tokens = (
                statistics.median(line[f"{unit}_per_second"] for line in lines[options.left_out :])
                for unit in ("samples", "tokens")
            )
            first = first or speed
            peak = summary.peak_memory_bytes
            print(
                f"| {number} | {strategy if number > 1 else '–'} | {samples} | {speed:.2f} | {tokens:.0f} | {speed / first:.2f}"
                f" | {speed / first / number:.0%} | {balance(here / 'plan', PreparedDataset(dataset, 'train'), number):.3f}"
                f" | {plan.memory['expected_bytes'] / 2**30:.2f}"
                f" | {'–' if peak is None else f'{peak / 2**30:.2f}'} | {summary.final_loss:.5f} | {whole:.0f} |",
                flush=True,
            )
            shutil.rmtree(here)


if __name__ == "__main__":
    main()
