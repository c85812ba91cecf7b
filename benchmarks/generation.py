"""Answers for evaluation at real size: our batches against a loop of single calls.

    python -m benchmarks.generation [--shape qwen2_vl_2b] [--work formula] [--rows 64] [--check]

Random weights in NF4 made on the GPU with a LoRA adapter of rank 16 on all linear layers, unmerged as in an evaluation;
rows come from a prepared dataset, so that reading and preparing images count. Random weights do not end an answer where a
trained model would, so all answers have the same number of tokens. Answers of unlike length gain less from batches: a
batch ends with its longest. The loop answers a few rows only, since its time does not depend on how many follow.

`--check` compares answers token by token instead: float32 and dense weights, every row by itself and in batches; it
fails where one differs.
`--shape tiny` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_step import TINY, WORK, Work, synchronize
from benchmarks.live_model import live_model, with_adapter
from benchmarks.random_rows import random_row, write_prepared
from vlm.data.prepared import PreparedDataset
from vlm.data.rows import Sample
from vlm.generate import predict
from vlm.kernels.install import fused
from vlm.lora.peft_model import base_model
from vlm.packing.model import packed

_WORDS = ("total", "invoice", "date", "company", "tax", "amount", "cash", "change", "item", "price", "receipt", "thank")


def make_rows(work: Work, number: int, processing: Any) -> Iterator[Sample]:
    """Random rows of a kind of work."""
    rng, noise = random.Random(1), np.random.default_rng(1)
    for _ in range(number):
        size = processing.target_size(rng.randint(*work.height), rng.randint(*work.width))
        answer = " ".join(rng.choices(_WORDS, k=rng.randint(*work.words)))
        yield random_row(processing, size, answer, noise)


class Bench:
    """A model with its adapter, and rows to answer."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        tiny = options.shape == "tiny"
        self.loaded = live_model(
            "qwen2_5_vl_3b" if tiny else options.shape,
            device=self.device,
            overlay=TINY if tiny else None,
            quantized=not options.check,
            dtype=torch.float32 if options.check else None,
        )
        self.model = with_adapter(self.loaded).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        self.new_tokens = options.new_tokens
        # `predict` lays its own settings over the model's; this one it leaves alone.
        base_model(self.model).generation_config.min_new_tokens = options.new_tokens
        # Most ids of a real vocabulary are words of no tiny tokenizer, and would be left out of a text.
        self.loaded.processing.decode = lambda ids: " ".join(map(str, ids))  # type: ignore[method-assign]
        rows = make_rows(WORK[options.work], options.rows, self.loaded.processing)
        self.rows = PreparedDataset(write_prepared(folder, "test", rows), "test")

    def answer(self, numbers: range, batch_size: int) -> list[str]:
        """Answers to some rows, as token ids."""
        # As in an evaluation, for the vision tower's sake.
        with packed(base_model(self.model), self.loaded.family):
            answers = predict(
                self.model,
                self.loaded.processing,
                self.rows,
                numbers,
                batch_size=batch_size,
                max_new_tokens=self.new_tokens,
            )
        assert all(answer.num_new_tokens == self.new_tokens for answer in answers), "an answer ended early"
        return [answer.prediction for answer in answers]

    def rate(self, num_rows: int, batch_size: int, pieces: tuple[Any, ...] = ()) -> tuple[float, float]:
        """Rows per second, and the peak of memory in GiB."""
        with ExitStack() as stack:
            if pieces:
                stack.enter_context(fused(base_model(self.model), self.loaded.family, pieces))
            # A batch of the same rows and few tokens: kernels are chosen and memory is taken.
            whole, self.new_tokens = self.new_tokens, 2
            settings = base_model(self.model).generation_config
            settings.min_new_tokens = 2
            self.answer(range(min(num_rows, batch_size)), batch_size)
            self.new_tokens = settings.min_new_tokens = whole
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            started = time.perf_counter()
            self.answer(range(num_rows), batch_size)
            synchronize()
            seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else 0
        return num_rows / seconds, peak / 2**30


def compare(bench: Bench, options: argparse.Namespace) -> None:
    """Fails unless batches give the answers of single calls."""
    numbers = range(options.rows)
    single = bench.answer(numbers, 1)
    if len(set(single)) == 1:
        raise SystemExit("all answers are alike, so equal ones would show nothing; take more --rows or --new-tokens")
    for batch_size in options.batch_sizes:
        differing = [number for number, text in enumerate(bench.answer(numbers, batch_size)) if text != single[number]]
        if differing:
            raise SystemExit(f"batches of {batch_size} differ from single calls in rows {differing} of {options.rows}")
        print(
            f"batches of {batch_size}: the {options.rows} answers of single calls ({len(set(single))} different ones)"
        )


def measure(bench: Bench, options: argparse.Namespace) -> None:
    """Prints a table."""
    from vlm.kernels.install import PIECES

    print("| rows at once | rows answered | rows/s | new tokens/s | against one by one | peak, GiB |")
    print("|---|---|---|---|---|---|")
    settings: list[tuple[str, int, int, tuple[Any, ...]]] = [("1", options.single_rows, 1, ())]
    settings += [(str(size), options.rows, size, ()) for size in options.batch_sizes]
    settings.append((f"{options.batch_sizes[-1]}, fused pieces", options.rows, options.batch_sizes[-1], PIECES))
    single = 0.0
    for name, num_rows, batch_size, pieces in settings:
        rate, peak = bench.rate(num_rows, batch_size, pieces)
        single = single or rate
        print(
            f"| {name} | {num_rows} | {rate:.2f} | {rate * options.new_tokens:.0f} | {rate / single:.1f} x | {peak:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["qwen2_vl_2b", "qwen2_5_vl_7b", "tiny"], default="tiny")
    parser.add_argument("--work", choices=WORK, default="formula")
    parser.add_argument("--rows", type=int, help="to answer (default: 64; 16 with --check)")
    parser.add_argument("--single-rows", type=int, default=6, help="that are answered one by one")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--new-tokens", type=int, help="of each answer (default: 64; 24 with --check)")
    parser.add_argument("--check", action="store_true", help="compare answers in float32 instead of measuring")
    options = parser.parse_args()
    options.rows = options.rows or (16 if options.check else 64)
    options.new_tokens = options.new_tokens or (24 if options.check else 64)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        bench = Bench(options, Path(folder))
        synchronize()
        made = time.perf_counter() - started
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
        device = torch.cuda.get_device_name() if bench.device == "cuda" else platform.processor() or "CPU"
        prompts = bench.rows.num_tokens - bench.rows.num_supervised_tokens
        print(
            f"{options.shape}, {options.work}: {options.rows} rows, prompts of {prompts.min()} to {prompts.max()} tokens,"
            f" {options.new_tokens} new tokens each. {device}; {versions}; Python {platform.python_version()}; made in"
            f" {made:.1f} s.\n"
        )
        if options.check:
            compare(bench, options)
        else:
            measure(bench, options)


if __name__ == "__main__":
    main()
