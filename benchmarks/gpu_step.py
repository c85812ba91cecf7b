"""One packed training step at real size: samples per second, memory and share of the matmul ceiling, piece by piece.

    python -m benchmarks.gpu_step --shape qwen2_5_vl_7b --work document [--settings NAME …] [--profile]

Random weights in NF4 made on the GPU, LoRA r=16 on all linear layers of vision tower and language model, 8-bit AdamW,
eight samples a step. Samples are as large as those of the three kinds of work below; texts are words and numbers, and
tokens are those of the tests' tokenizer, whose number is printed. A setting is a set of fused pieces and what happens to
activations; each is timed by itself, after warm-up, batches already on the GPU, their pixels as the bytes that a training
sends. "Host embedding" has the input embedding in the host's memory, and so has "offload". The ceiling is a bfloat16
product of 8192³ in the same run; the work counted is 4 operations per weight and token, none for recomputation, attention
left out.
The largest shapes fit on one card of 141 GB: take `--settings "all, auto" --steps 2 --warmup 1`. `--shape tiny` and
`--shape tiny_llama` try the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from benchmarks.live_model import live_model, with_adapter
from benchmarks.random_rows import random_row
from vlm.config import TrainingConfig
from vlm.data.rows import Sample
from vlm.families.pixels import finished
from vlm.kernels.host_embedding import embedding_on_host, why_not
from vlm.kernels.install import PIECES, fused
from vlm.lora.peft_model import adapter_parameters, base_model
from vlm.packing.model import packed
from vlm.training.activation import USABLE_SHARE, ActivationPlan, choose_activations
from vlm.training.capture import Stack, graph_stacks
from vlm.training.collator import VisionDataCollator
from vlm.training.flat import FlatParameters
from vlm.training.loss import add_supervised_loss
from vlm.training.memory import MemoryEstimate, estimate_memory, towers
from vlm.training.recompute import recomputed


@dataclass(frozen=True)
class Work:
    """Ranges of image width and height in pixels and of words in the answer."""

    width: tuple[int, int]
    height: tuple[int, int]
    words: tuple[int, int]


WORK = {
    "lines": Work((200, 900), (40, 120), (4, 60)),
    "formula": Work((150, 700), (60, 300), (10, 90)),
    "document": Work((700, 1000), (900, 1300), (60, 320)),
}
TINY: dict[str, Any] = {
    "tie_word_embeddings": False,
    "text_config": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
    },
}
TINY_LLAMA: dict[str, Any] = {
    "text_config": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "vocab_size": 2048,
        "cross_attention_layers": [3],
    },
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 128,
    },
}
# Name: the published model's shape, and what is laid over it.
SHAPES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "tiny": ("qwen2_5_vl_3b", TINY),
    "tiny_llama": ("llama3_2_vision_11b", TINY_LLAMA),
    **{
        size: (size, None)
        for size in (
            "qwen2_vl_2b",
            "qwen2_5_vl_7b",
            "llama3_2_vision_11b",
            "qwen2_vl_72b",
            "llama3_2_vision_90b",
        )
    },
}
HOST, GRAPHS = ", host embedding", ", graphs"
# Name: pieces, whose head, activations. With HOST in it, the input embedding lies in the host's memory; with GRAPHS behind
# it, layers are replayed as CUDA graphs, if the plan finds room for them.
SETTINGS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "eager": ((), "trl", "recompute"),
    "own head": ((), "own", "recompute"),
    "+ linear": (("linear",), "own", "recompute"),
    "+ mlp": (("linear", "mlp"), "own", "recompute"),
    "+ norm": (("linear", "mlp", "norm"), "own", "recompute"),
    "all, recompute": (PIECES, "own", "recompute"),
    "all, recompute" + HOST: (PIECES, "own", "recompute"),
    "all, offload": (PIECES, "own", "offload"),
    "all, keep": (PIECES, "own", "keep"),
    "all, auto": (PIECES, "own", "auto"),
}
SETTINGS |= {
    name + GRAPHS: SETTINGS[name]
    for name in ("own head", "all, recompute", "all, recompute" + HOST, "all, keep", "all, auto")
}


def make_rows(work: Work, number: int, processing: Any) -> list[Sample]:
    """Random samples of a kind of work."""
    rng, noise = random.Random(1), np.random.default_rng(1)
    words = [
        "total",
        "invoice",
        "date",
        "company",
        "address",
        "tax",
        "amount",
        "cash",
        "change",
        "item",
        "qty",
        "price",
        "receipt",
        "thank",
        "you",
    ]
    rows = []
    for _ in range(number):
        size = processing.target_size(rng.randint(*work.height), rng.randint(*work.width))
        least, most = work.words
        pairs = int(rng.triangular(least, most, least + (most - least) / 4)) // 2 + 1
        answer = " ".join(f"{rng.choice(words)} {rng.randint(0, 999)}" for _ in range(pairs))
        rows.append(random_row(processing, size, answer, noise))
    return rows


def median_seconds(function: Callable[[], Any], repeats: int, warmup: int) -> tuple[float, float]:
    """Median after warm-up, and the very first call."""
    seconds = []
    for _ in range(warmup + repeats):
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[warmup:]), seconds[0]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ceiling(device: str) -> float:
    """Operations per second of one large matrix product."""
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: a @ b, 20, 5)[0]


class Bench:
    """A model, its adapter and one step's batches."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        started = time.perf_counter()
        size, overlay = SHAPES[options.shape]
        self.loaded = live_model(size, device=self.device, overlay=overlay)
        self.model = with_adapter(self.loaded)
        self.base = base_model(self.model)
        synchronize()
        self.made_seconds = time.perf_counter() - started
        collator = VisionDataCollator(
            self.loaded.processing, model_config=self.base.config.to_dict(), pixels_as_bytes=True
        )
        rows = make_rows(WORK[options.work], options.samples, self.loaded.processing)
        parts = [rows[first :: options.packs] for first in range(options.packs)]
        self.batches = [send_to_device(collator.pack(part), self.device) for part in parts]
        self.num_tokens = [batch["input_ids"].numel() for batch in self.batches]
        self.num_supervised = [int((batch["labels"][:, 1:] != -100).sum()) for batch in self.batches]
        image = self.base.config.image_token_id
        self.num_visual = [int((batch["input_ids"] == image).sum()) for batch in self.batches]
        config, family = self.base.config.to_dict(), self.loaded.family
        self.patches_per_token = family.patches_per_token(config) if family.patches_per_token else None
        self.parameters = list(adapter_parameters(self.model).values())
        self.optimizer: Any
        self.flat: FlatParameters | None = None
        if self.device == "cuda":
            import bitsandbytes as bnb

            self.optimizer = bnb.optim.AdamW8bit(self.parameters, lr=1e-5)
            self.flat = FlatParameters(self.optimizer)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        frozen = [parameter for parameter in self.base.parameters() if not parameter.requires_grad]
        self.weights_bytes = sum(parameter.numel() * parameter.element_size() for parameter in frozen)
        for state in (getattr(parameter, "quant_state", None) for parameter in frozen):
            if state is not None:
                self.weights_bytes += state.absmax.numel() + 4 * state.state2.absmax.numel()

    def operations(self) -> float:
        """4 per weight and position: the forward pass, and the backward pass of the activations."""
        family, total = self.loaded.family, 0.0
        positions = {
            "language": sum(self.num_tokens),
            "vision": (self.patches_per_token or 4) * sum(self.num_visual),
            # One token stands for all patches of an image where it is looked at through cross-attention.
            "projector": (self.patches_per_token or 1) * sum(self.num_visual),
            "head": sum(self.num_supervised),
        }
        for name, module in self.base.named_modules():
            inputs, outputs = getattr(module, "in_features", 0), getattr(module, "out_features", 0)
            part = family.part_of(name)
            # An adapted layer has its base layer and its two matrices inside; the layer itself counts once.
            if inputs and ".base_layer" not in name and ".lora_" not in name and part is not None:
                total += 4.0 * inputs * outputs * positions[part]
        return total

    def estimate(self, plan: ActivationPlan, *, fused: bool) -> MemoryEstimate:
        """What the training plan would say of this step."""
        return estimate_memory(
            self.base.config.to_dict(),
            self.loaded.family,
            weights_bytes=self.weights_bytes,
            num_trainable=sum(parameter.numel() for parameter in self.parameters),
            trains_vision=True,
            length_tokens=max(self.num_tokens),
            num_visual_tokens=max(self.num_visual),
            value_bytes=2 if self.device == "cuda" else 4,
            activations=plan,
            fused=fused,
            optimizer="adamw_8bit" if self.device == "cuda" else "adamw",
            patches_per_token=self.patches_per_token,
            on_gpu=self.device == "cuda",
        )

    def plan(self, mode: str, *, fused: bool, captured: bool, memory: int | None) -> ActivationPlan:
        """What the training plan would do with activations."""
        language, vision, _ = towers(self.base.config.to_dict(), self.loaded.family)
        checked = TrainingConfig.model_validate({"activation_memory": mode})
        return choose_activations(
            checked.activation_memory,
            num_vision_layers=vision.num_layers,
            num_language_layers=language.num_layers,
            expected_bytes=lambda plan: self.estimate(plan, fused=fused).reserved_bytes,
            device_memory_bytes=memory,
            embedding_can_move=why_not(self.base) is None,
            graphs=captured,
            launch_bound=language.slot_bytes(max(self.num_tokens), 2) > 0,
        )

    def step(self) -> None:
        """Forward and backward over all packs, and the optimiser."""
        total = sum(self.num_supervised)
        if self.flat is not None:
            self.flat.begin()
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        for sent in self.batches:
            batch = finished(sent, dtype)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                output = self.model(**batch, **self.call)
                loss = (output.total if "supervised" in self.call else -output.log_probs.sum()) / total
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def stacks(self, plan: ActivationPlan) -> tuple[Stack, Stack] | None:
        """For CUDA graphs."""
        merged = towers(self.base.config.to_dict(), self.loaded.family)[2]
        stacks = graph_stacks(
            self.model, plan, most_patches=merged * max(self.num_visual), most_tokens=max(self.num_tokens)
        )
        for stack in stacks or ():
            stack.flat = self.flat
        return stacks

    def run(self, name: str, options: argparse.Namespace, matmul: float) -> str:
        """Times a setting and gives its line of the table."""
        pieces, head, mode = SETTINGS[name]
        memory = None
        if self.device == "cuda":
            memory = int(options.memory_gib * 2**30) if options.memory_gib else torch.cuda.mem_get_info()[1]
        captured = self.device == "cuda" and name.endswith(GRAPHS)
        plan = self.plan(mode, fused="linear" in pieces, captured=captured, memory=memory)
        if HOST in name:
            reason = why_not(self.base)
            if reason is not None:
                return f"| {name} | | left out: {reason} | | | | | | |"
            plan = replace(plan, embedding_on_host=True, cuda_graphs=False)
            if captured:
                moved = replace(plan, cuda_graphs=True)
                needed = self.estimate(moved, fused="linear" in pieces).reserved_bytes
                plan = moved if memory is None or needed <= USABLE_SHARE * memory else plan
        with ExitStack() as stack:
            stock = self.base.forward
            stack.callback(self.base.__dict__.pop, "forward", None)
            if head == "own":
                add_supervised_loss(self.base)
                self.call = {"supervised": True}
            else:
                from trl.trainer.utils import add_fused_lm_head

                add_fused_lm_head(self.base)
                self.call = {"fused_lm_head": True}
            assert self.base.forward is not stock
            report = stack.enter_context(fused(self.base, self.loaded.family, pieces))
            if plan.embedding_on_host:
                stack.enter_context(embedding_on_host(self.base))
            stacks = self.stacks(plan) if plan.cuda_graphs else None
            stack.enter_context(recomputed(self.base, self.loaded.family, plan, stacks=stacks))
            stack.enter_context(packed(self.base, self.loaded.family))
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds, first = median_seconds(self.step, options.steps, options.warmup)
            if options.profile:
                print(report, file=sys.stderr)
                for own in stacks or ():
                    print(f"graphs: {own.num_replays} replays; without: {dict(own.reasons)}", file=sys.stderr)
                profile(self.step)
        cuda = self.device == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        # What graphs use while they are replayed counts here only.
        reserved = torch.cuda.max_memory_reserved() if cuda else 0
        expected = self.estimate(plan, fused="linear" in pieces).expected_bytes
        rate = options.samples / seconds
        share = self.operations() / seconds / matmul
        recomputing = f"{plan.recomputed_vision}, {plan.recomputed_language}".replace("None", "all")
        return (
            f"| {name} | {recomputing}{' offloaded' * plan.offload}{HOST * plan.embedding_on_host}{GRAPHS * plan.cuda_graphs} | {rate:.2f} | {seconds:.3f} | {first:.1f}"
            f" | {peak / 2**30:.2f} | {reserved / 2**30:.2f} | {expected / 2**30:.2f} | {share:.1%} |"
        )


def profile(step: Callable[[], None]) -> None:
    """Prints where one step's time goes."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as result:
        step()
        synchronize()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(result.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--work", choices=WORK, default="formula")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--samples", type=int, default=8, help="of a step")
    parser.add_argument("--packs", type=int, default=1, help="that a step is cut into")
    parser.add_argument("--steps", type=int, default=8, help="timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps before")
    parser.add_argument("--memory-gib", type=float, help="lets a GPU have only so much")
    parser.add_argument("--profile", action="store_true", help="print each setting's kernels")
    options = parser.parse_args()
    if options.memory_gib and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(options.memory_gib * 2**30 / torch.cuda.mem_get_info()[1])
    bench = Bench(options)
    matmul = ceiling(bench.device)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    device = torch.cuda.get_device_name() if bench.device == "cuda" else platform.processor() or "CPU"
    print(
        f"{options.shape}, {options.work}: {options.samples} samples in {options.packs} packs, {sum(bench.num_tokens)} tokens"
        f" ({sum(bench.num_visual)} visual, {sum(bench.num_supervised)} supervised). {device}; {versions};"
        f" Python {platform.python_version()}; matmul {matmul / 1e12:.2f} TFLOP/s; model made in {bench.made_seconds:.1f} s.\n"
    )
    print(
        "| setting | recomputed layers (vision, language) | samples/s | step, s | first step, s | peak, GiB | reserved, GiB | expected, GiB | share of ceiling |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.settings:
        try:
            print(bench.run(name, options, matmul), flush=True)
        except torch.OutOfMemoryError:
            print(f"| {name} | | out of memory | | | | | | |", flush=True)
            bench.model.zero_grad(set_to_none=True)
    print(f"\nHost memory at its peak: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB.")


if __name__ == "__main__":
    main()
