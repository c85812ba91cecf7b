"""Every family at its smallest real size on one GPU: load, NF4, LoRA, five steps, answers, merged model.

    python -m benchmarks.gpu_families --data PATH [--models qwen2_vl_2b …] [--work-dir DIR]

PATH is any source of images and texts; the published figures take whole receipts. Prints a table in Markdown: wall
seconds of each step and the GPU's peak memory in it. Weights are random (see `real_size.py`). The largest needs 60 GB
of disk. `--shrink` cuts the models to two layers a tower, to try the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.real_size import make_checkpoint

SMALLEST = ("qwen2_vl_2b", "qwen2_5_vl_3b", "deepseek_ocr", "llama3_2_vision_11b", "pixtral_12b")
_SMALL_VOCABULARY = {"vocab_size": 2048}
# Two layers a tower, and as few wide layers as each family's configuration can do with.
SHRUNK: dict[str, dict[str, Any]] = {
    "qwen2_vl_2b": {"text_config": {**_SMALL_VOCABULARY, "num_hidden_layers": 2}, "vision_config": {"depth": 2}},
    "qwen2_5_vl_3b": {
        "text_config": {**_SMALL_VOCABULARY, "num_hidden_layers": 2},
        "vision_config": {"depth": 2, "fullatt_block_indexes": [1]},
    },
    "deepseek_ocr": {
        **_SMALL_VOCABULARY,
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
        "language_config": {**_SMALL_VOCABULARY, "num_hidden_layers": 2, "n_routed_experts": 8},
    },
    "llama3_2_vision_11b": {
        "text_config": {**_SMALL_VOCABULARY, "num_hidden_layers": 2, "cross_attention_layers": [1]},
        "vision_config": {
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 2560,
        },
    },
    "pixtral_12b": {
        "text_config": {**_SMALL_VOCABULARY, "num_hidden_layers": 2},
        "vision_config": {"num_hidden_layers": 2},
    },
}


class Clock:
    """Wall seconds and peak GPU memory by step."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[float, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measures a block."""
        import torch

        gc.collect()
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        self.steps[name] = (time.perf_counter() - started, peak)


def run(size: str, options: argparse.Namespace, device: str, dtype: str) -> tuple[Clock, dict[str, Any]]:
    """One model from its weights to its merged copy."""
    from vlm.config import DataConfig, GenerationConfig, LoraConfig, ModelConfig, TrainingConfig
    from vlm.data.prepare import prepare_dataset
    from vlm.export import export
    from vlm.generate import generate_predictions
    from vlm.loading.build import build_checkpoint
    from vlm.loading.checkpoint import load_checkpoint
    from vlm.lora.build import build_adapter
    from vlm.training.plan import make_plan
    from vlm.training.train import train_adapter

    work = options.work_dir / size
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    clock = Clock()
    with clock.step("made at random"):
        source = make_checkpoint(size, work / "source", config=SHRUNK[size] if options.shrink else None)
    with clock.step("load and quantise"):
        settings = ModelConfig(name=str(source), quantization="nf4")
        description = build_checkpoint(settings, work / "checkpoint", device=device, dtype=dtype)
    shutil.rmtree(source)
    with clock.step("reload"):
        loaded = load_checkpoint(work / "checkpoint", device=device)
    with clock.step("configure LoRA"):
        adapter = build_adapter(loaded, LoraConfig(), work / "initial")
    (work / "dataset").mkdir()
    with clock.step("prepare dataset"):
        data = DataConfig.model_validate({"sources": [options.data], "max_dropped_fraction": 0.5})
        summary = prepare_dataset(data, loaded.processing, work / "dataset", required_splits=("train", "test"))
    training = TrainingConfig(max_steps=5, batch_size=2, gradient_accumulation=2, log_every_steps=1)
    with clock.step("plan"):
        plan = make_plan(
            work / "dataset", work / "checkpoint", work / "initial", training, work / "plan", device=device, dtype=dtype
        )
    with clock.step("train 5 × 4"):
        trained = train_adapter(
            loaded,
            work / "initial",
            work / "dataset",
            work / "plan",
            training,
            work / "trained",
            work_dir=work / "checkpoints",
        )
    generation = GenerationConfig(max_rows=8, batch_size=8, max_new_tokens=64)
    with clock.step("answer 8 rows"):
        generate_predictions(
            loaded, work / "dataset", generation, work / "answers", adapter_dir=work / "trained" / "adapter"
        )
    del loaded
    with clock.step("merge"):
        merged = export(
            "merged_16bit",
            work / "checkpoint",
            work / "trained" / "adapter",
            work / "merged",
            max_shard_size_mb=4000,
            device=device,
        )
    facts = {
        "parameters": description.num_parameters,
        "checkpoint_bytes": sum(path.stat().st_size for path in (work / "checkpoint").rglob("*.safetensors")),
        "adapted": adapter.num_targets,
        "merged": merged.num_adapted_modules,
        "trainable": adapter.num_trainable_parameters,
        "mean_tokens": round(summary.splits["train"].num_tokens / max(summary.splits["train"].num_rows, 1)),
        "expected_gib": round(plan.memory["expected_bytes"] / 2**30, 2),
        "loss": trained.final_loss,
    }
    shutil.rmtree(work)
    return clock, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="source of images and texts")
    parser.add_argument("--models", nargs="+", choices=SMALLEST, default=list(SMALLEST))
    parser.add_argument("--work-dir", type=Path, default=Path("runs/gpu_families"))
    parser.add_argument("--shrink", action="store_true", help="two layers a tower")
    options = parser.parse_args()

    import torch

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", "bfloat16") if on_gpu else ("cpu", "float32")
    results: dict[str, tuple[Clock, dict[str, Any]]] = {}
    for size in options.models:
        try:
            results[size] = run(size, options, device, dtype)
        except Exception:
            print(f"{size} failed:", file=sys.stderr)
            traceback.print_exc()
            shutil.rmtree(options.work_dir / size, ignore_errors=True)
            continue
        print(json.dumps({size: results[size][1], **results[size][0].steps}), flush=True)
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    libraries = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    print(
        f"\n{name}; {', '.join(f'{library} {version(library)}' for library in libraries)}; Python {sys.version.split()[0]}"
    )
    if not results:
        raise SystemExit(1)
    print_table("wall seconds", results, lambda clock, step: f"{clock.steps[step][0]:.1f}")
    if on_gpu:
        print_table("peak GiB", results, lambda clock, step: f"{clock.steps[step][1]:.2f}")
    names = list(next(iter(results.values()))[1])
    print("\n| model | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for size, (_, facts) in results.items():
        print(f"| {size} | " + " | ".join(str(value) for value in facts.values()) + " |")
    if len(results) < len(options.models):
        raise SystemExit(1)


def print_table(
    title: str, results: dict[str, tuple[Clock, dict[str, Any]]], cell: Callable[[Clock, str], str]
) -> None:
    """One row per step, one column per model."""
    steps = list(next(iter(results.values()))[0].steps)
    print(f"\n| {title} | " + " | ".join(results) + " |\n|---|" + "---|" * len(results))
    for step in steps:
        print(f"| {step} | " + " | ".join(cell(clock, step) for clock, _ in results.values()) + " |")


if __name__ == "__main__":
    main()
