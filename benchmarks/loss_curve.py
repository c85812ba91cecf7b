"""The first losses of our trainer beside those of TRL's: same rows, same order, same adapter, same learning rate.

    python -m benchmarks.loss_curve [--shape qwen2_vl_2b] [--steps 30] [--output FILE]

A model of random weights in NF4 learns short texts of few words about images. Ours packs a step's rows into one, fuses
kernels and makes logits for supervised tokens only. The peer is TRL's `SFTTrainer` over a peft model, with batches padded
on the right. The runs, one after the other on the same model:

    ours                      one pack of 8 rows
    TRL, 1 x 8                one micro-batch of 8; the adapter in float32, as ours is
    TRL, 2 x 4                two micro-batches of 4: how far rounding alone takes two runs apart
    TRL, 1 x 8, as it comes   (with --as-it-comes) the adapter in bfloat16, to which TRL turns it over a quantised base
    float32                   (with --reference) TRL, 1 x 8, with the same weights in float32: the truth that the others round

Both read ids and pixels from the same prepared dataset: training is compared, not preprocessing. TRL's micro-batches weigh
by their tokens, as ours do, which this model's class would otherwise switch off. `--shape tiny` tries the script on a CPU,
in float32, where curves agree to rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.gpu_step import TINY
from benchmarks.live_model import live_model
from benchmarks.random_rows import random_row, write_prepared
from vlm.config import LoraConfig, ModelConfig, TrainingConfig
from vlm.data.prepared import PreparedDataset
from vlm.data.rows import Sample
from vlm.loading.build import CheckpointSummary
from vlm.loading.checkpoint import LoadedModel
from vlm.loading.model_config import model_config
from vlm.loading.quantization import blueprint, unquantized_modules
from vlm.lora.attach import attach_adapter, detach_adapter
from vlm.lora.build import build_adapter
from vlm.lora.peft_model import adapter_parameters, base_model
from vlm.training.collator import VisionDataCollator
from vlm.training.plan import make_plan
from vlm.training.train import train_adapter
from vlm.training.trainer import forward_restored

BATCH = 8
_WORDS = ("total", "invoice", "date", "tax", "amount", "cash", "item", "price")


def make_rows(number: int, processing: Any) -> Iterator[Sample]:
    """Training rows: a word and its number, a few times over."""
    rng, noise = random.Random(1), np.random.default_rng(1)
    for _ in range(number):
        size = processing.target_size(rng.randint(40, 120), rng.randint(100, 400))
        word = rng.choice(_WORDS)
        answer = " ".join(f"{word} {len(word)}" for _ in range(rng.randint(3, 12)))
        yield random_row(processing, size, answer, noise)


def described(loaded: LoadedModel, folder: Path) -> LoadedModel:
    """Puts beside a live model what later steps read of its checkpoint: everything but the weights."""
    config = json.loads((loaded.checkpoint_dir / "config.json").read_text(encoding="utf-8"))
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    bare = blueprint(loaded.family, model_config(loaded.checkpoint_dir, loaded.family))
    num_linear = sum(isinstance(module, torch.nn.Linear) for module in bare.modules())
    summary = CheckpointSummary(
        family=loaded.family.model_type,
        source="random weights",
        quantization="nf4",
        double_quantization=True,
        keep_unquantized=(),
        dtype=loaded.dtype,
        num_parameters=sum(parameter.numel() for parameter in bare.parameters()),
        num_quantized_modules=num_linear - len(unquantized_modules(bare, loaded.family, ModelConfig())),
        unquantized_experts=(),
    )
    (folder / "checkpoint.json").write_text(json.dumps(summary.to_json()), encoding="utf-8")
    return dataclasses.replace(loaded, checkpoint_dir=folder)


REFERENCE = "float32"


class InOrder(SFTTrainer):
    """TRL's trainer, taking rows in the order of the data set."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)

    def _send_telemetry(self) -> None:
        """A benchmark reports to nobody."""


class Bench:
    """A model, its initial adapter, rows and a plan that says in which order they come."""

    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        self.root, self.steps = root, options.steps
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        tiny = options.shape == "tiny"
        loaded = live_model(
            "qwen2_5_vl_3b" if tiny else options.shape, device=self.device, overlay=TINY if tiny else None
        )
        self.loaded = described(loaded, root / "checkpoint")
        build_adapter(self.loaded, LoraConfig(rank=16, alpha=16), root / "initial")
        write_prepared(root / "dataset", "train", make_rows(options.steps * BATCH, loaded.processing))
        self.training = TrainingConfig(
            max_steps=options.steps,
            batch_size=BATCH,
            gradient_accumulation=1,
            learning_rate=options.learning_rate,
            warmup_fraction=0.0,
            optimizer="adamw",
            log_every_steps=1,
            checkpoint_every_steps=options.steps,
        )
        plan = make_plan(
            root / "dataset",
            self.loaded.checkpoint_dir,
            root / "initial",
            self.training,
            root / "plan",
            device=self.device,
            dtype=self.loaded.dtype,
        )
        batches = datasets.Dataset.from_file(str(root / "plan" / "batches.arrow"))
        self.order = [int(row) for rows in batches["rows"] for row in rows]
        assert len(self.order) == options.steps * BATCH, "the plan takes every row once"
        assert plan.packing, "ours packs"

    def ours(self) -> list[float]:
        """Losses of our trainer."""
        train_adapter(
            self.loaded,
            self.root / "initial",
            self.root / "dataset",
            self.root / "plan",
            self.training,
            self.root / "out",
            work_dir=self.root / "work",
        )
        lines = (self.root / "out" / "training" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    def reference(self) -> list[float]:
        """Losses of TRL's trainer in float32. The model stays so."""
        self.loaded.model.float()
        for module in self.loaded.model.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = torch.float32
        return self.peer(BATCH, dtype="float32")

    def peer(self, batch_size: int, *, as_it_comes: bool = False, dtype: str = "bfloat16") -> list[float]:
        """Losses of TRL's trainer."""
        rows = PreparedDataset(self.root / "dataset", "train")
        collate = VisionDataCollator(self.loaded.processing)
        on_gpu = self.device == "cuda"
        name = (
            "activation_checkpointing" if hasattr(SFTConfig, "activation_checkpointing") else "gradient_checkpointing"
        )
        settings: dict[str, Any] = {
            "output_dir": str(self.root / "peer"),
            "max_steps": self.steps,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": BATCH // batch_size,
            "learning_rate": self.training.learning_rate,
            "lr_scheduler_type": self.training.schedule,
            "weight_decay": self.training.weight_decay,
            "max_grad_norm": self.training.max_grad_norm,
            "optim": "adamw_torch_fused" if on_gpu else "adamw_torch",
            "bf16": on_gpu and dtype == "bfloat16",
            "use_cpu": not on_gpu,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "max_length": None,
            "dataloader_pin_memory": on_gpu,
            name: False,  # changes the time, not the losses
        }
        model = attach_adapter(self.loaded, self.root / "initial", trainable=True)
        parameters = [(parameter, parameter.data) for parameter in adapter_parameters(model).values()]
        try:
            with forward_restored(base_model(model)):
                trainer = InOrder(
                    model=model.train(),
                    args=SFTConfig(**settings),
                    data_collator=lambda items: collate([rows[item["row"]] for item in items]),
                    train_dataset=datasets.Dataset.from_dict({"row": self.order}),
                    processing_class=self.loaded.processing.tokenizer,
                )
                trainer.model_accepts_loss_kwargs = True
                trainer.remove_callback(PrinterCallback)
                if not as_it_comes:
                    for parameter, data in parameters:
                        parameter.data = data
                trainer.train()
        finally:
            detach_adapter(model)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def table(curves: dict[str, list[float]]) -> str:
    """The curves in Markdown, a row per step."""
    names = list(curves)
    lines = ["| step | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for step, losses in enumerate(zip(*curves.values(), strict=True), 1):
        lines.append(f"| {step} | " + " | ".join(f"{loss:.4f}" for loss in losses) + " |")
    return "\n".join(lines)


def apart(curves: dict[str, list[float]]) -> str:
    """How far each curve is from the float32 one, or from TRL's first one, in Markdown."""
    against = REFERENCE if REFERENCE in curves else "TRL, 1 x 8"
    lines = [f"| against {against} | greatest difference | at step | mean difference |", "|---|---|---|---|"]
    reference = np.array(curves[against])
    for name, losses in curves.items():
        if name != against:
            difference = np.abs(np.array(losses) - reference)
            lines.append(f"| {name} | {difference.max():.1e} | {difference.argmax() + 1} | {difference.mean():.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["qwen2_vl_2b", "tiny"], default="tiny")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--as-it-comes", action="store_true", help="also with TRL's own precision of the adapter")
    parser.add_argument("--reference", action="store_true", help="also in float32, against which all are compared")
    parser.add_argument("--output", type=Path, help="a file for the tables")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        bench = Bench(options, Path(folder))
        made = time.perf_counter() - started
        runs = {
            "ours": bench.ours,
            "TRL, 1 x 8": lambda: bench.peer(BATCH),
            "TRL, 2 x 4": lambda: bench.peer(BATCH // 2),
        }
        if options.as_it_comes:
            runs["TRL, 1 x 8, as it comes"] = lambda: bench.peer(BATCH, as_it_comes=True)
        if options.reference:
            runs[REFERENCE] = bench.reference
        curves, seconds = {}, []
        for name, run in runs.items():
            started = time.perf_counter()
            curves[name] = run()
            seconds.append(f"{name}: {time.perf_counter() - started:.1f} s")
            print(f"{seconds[-1]}, losses {' '.join(f'{loss:.4f}' for loss in curves[name])}", flush=True)
    libraries = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    device = torch.cuda.get_device_name() if bench.device == "cuda" else platform.processor() or "CPU"
    header = (
        f"{options.shape}: {options.steps} steps of {BATCH} rows, learning rate {options.learning_rate:g}, {bench.loaded.dtype}."
        f" {device}; {', '.join(f'{library} {version(library)}' for library in libraries)}; Python"
        f" {platform.python_version()}. Made in {made:.1f} s; {'; '.join(seconds)}, first steps included."
    )
    text = "\n\n".join((header, apart(curves), table(curves)))
    print("\n" + text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
