"""How full packs get on real data, and what packing saves on a CPU.

    python benchmarks/packing.py [--data ../shared/data] [--max-pixels N] [--speed-of sroie_lines]

Fullness is over one epoch of the training split, the last pack included, with token counts of the built-in model's
tokenizer and Qwen2-VL's image tokens. Packs are planned a little smaller than asked where that spreads an epoch evenly. The
last column is for comparison: the share of tokens in padded batches of eight shuffled rows. Speed is forward and backward of the built-in model with an adapter on all its
linear layers over the same steps, packed and padded in turn, without data loading.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

SETS = ("sroie_lines", "sroie_kie", "poilus_lines", "im2latex", "tabmwp")


def prepared(data: Path, name: str, processing: Any, max_pixels: int, folder: Path) -> Path:
    from vlm.config.data import DataConfig
    from vlm.data.prepare import prepare_dataset

    (folder / name).mkdir()
    source = {"path": str(data / name / "train.parquet"), "split": "train"}
    config = DataConfig.model_validate({"sources": [source], "max_pixels": max_pixels})
    summary = prepare_dataset(config, processing, folder / name, num_workers=1)
    assert summary.num_dropped == 0, summary
    return folder / name


def fullness_table(folders: dict[str, Path], capacity: int) -> None:
    import numpy as np

    from vlm.config import TrainingConfig
    from vlm.data.prepared import PreparedDataset
    from vlm.training.steps import PackLimits, full_pack_size, plan_batches, plan_full_packs

    print(
        "| set | rows | tokens per row | packs | tokens of a pack as planned | fullness | least full | plan, s | padded, 8 rows |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, folder in folders.items():
        rows = PreparedDataset(folder, "train")
        lengths = np.asarray(rows.num_tokens, np.int64)
        eight = TrainingConfig(batch_size=8, gradient_accumulation=1)
        padded = sum(int(lengths[batch].max()) * len(batch) for _, batch in plan_batches(lengths, eight))
        start = time.perf_counter()
        training = TrainingConfig(tokens_per_step=capacity)
        size, per_step = full_pack_size(
            lengths, training, PackLimits(None, lengths[:, None].astype(np.float64), np.inf)
        )
        packs = np.array([lengths[pack].sum() for _, pack in plan_full_packs(lengths, training, size, per_step)])
        seconds = time.perf_counter() - start
        assert packs.sum() == lengths.sum()
        print(
            f"| {name} | {len(rows)} | {lengths.min()}–{lengths.max()}, mean {lengths.mean():.0f} | {len(packs)} | {size} "
            f"| {packs.sum() / (len(packs) * size):.1%} | {packs.min() / size:.1%} | {seconds:.2f} "
            f"| {lengths.sum() / padded:.1%} |",
            flush=True,
        )


def speed_table(folder: Path, checkpoint: Path, num_rows: int, repeats: int) -> None:
    import numpy as np
    import torch

    from vlm.config import LoraConfig, ModelConfig, TrainingConfig
    from vlm.data.prepared import PreparedDataset
    from vlm.loading.build import build_checkpoint
    from vlm.loading.checkpoint import load_checkpoint
    from vlm.lora.attach import attached
    from vlm.lora.build import build_adapter
    from vlm.packing.model import packed
    from vlm.training.collator import VisionDataCollator
    from vlm.training.steps import plan_batches

    build_checkpoint(ModelConfig(name="builtin-random", precision="float32"), checkpoint, device="cpu", dtype="float32")
    loaded = load_checkpoint(checkpoint, device="cpu")
    build_adapter(loaded, LoraConfig(rank=16), checkpoint / "adapter")
    rows = PreparedDataset(folder, "train")
    lengths = np.asarray(rows.num_tokens)[:num_rows]
    collator = VisionDataCollator(loaded.processing, model_config=loaded.model.config.to_dict())
    # Rows in the order of the data, eight to a step; so padding is what random rows have.
    steps = [[rows[row] for row in range(start, min(start + 8, num_rows))] for start in range(0, num_rows, 8)]
    sorted_steps = [
        [rows[int(row)] for row in batch]
        for _, batch in plan_batches(lengths, TrainingConfig(batch_size=2, gradient_accumulation=4))
    ]
    settings = {
        "padded, 2 x 4, rows of a step sorted": [collator(step) for step in sorted_steps],
        "padded, 8 x 1": [collator(step) for step in steps],
        "packed, 1 row": [collator.pack(step) for step in steps],
    }
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    with attached(loaded, checkpoint / "adapter", trainable=True) as model, packed(loaded.model, loaded.family):
        model.train()
        for round_ in range(repeats + 1):
            for name, batches in settings.items():
                start = time.perf_counter()
                for batch in batches:
                    model(**batch).loss.backward()
                if round_:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
                model.zero_grad()
    tokens = int(lengths.sum())
    print("\n| setting | tokens/s, median | range | against the first |\n|---|---|---|---|")
    first = statistics.median(next(iter(seconds.values())))
    for name, own in seconds.items():
        median = statistics.median(own)
        print(
            f"| {name} | {tokens / median:.0f} | {tokens / max(own):.0f}–{tokens / min(own):.0f} | {first / median:.2f} × |"
        )
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, {num_rows} rows, {repeats} rounds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=PROJECT.parent / "shared" / "data")
    parser.add_argument("--max-pixels", type=int, default=1280 * 28 * 28)
    parser.add_argument("--capacity", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens of a pack")
    parser.add_argument("--speed-of", default="sroie_lines", help="the set whose first rows are timed")
    parser.add_argument("--rows", type=int, default=64, help="rows that are timed; 0 times none")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    from vlm.builtin import make_builtin_checkpoint
    from vlm.processing import Processing

    print(
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "builtin").mkdir()
        processing = Processing.from_dir(make_builtin_checkpoint(folder / "builtin"))
        folders = {own: prepared(options.data, own, processing, options.max_pixels, folder) for own in SETS}
        for capacity in options.capacity:
            print(f"\nPacks of at most {capacity} tokens:\n")
            fullness_table(folders, capacity)
        if options.rows:
            speed_table(folders[options.speed_of], folder / "checkpoint", options.rows, options.repeats)


if __name__ == "__main__":
    main()
