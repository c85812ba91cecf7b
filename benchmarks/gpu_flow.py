"""The whole flow at real size: random weights in the shape of Qwen2.5-VL-7B, NF4, ten steps on whole receipts.

    python benchmarks/gpu_flow.py --data PATH [--shape 7b|tiny] [--steps 10] [--work-dir DIR]

Speed and memory do not depend on the weights' values, so random ones measure them honestly; quality they cannot show.
PATH is any source of images and texts; the published figures take receipts of about 1,000 × 2,000 pixels. Needs about
25 GB of disk for 7b. Prints a table in Markdown; `--shape tiny` checks the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

SHAPES = {
    "7b": {
        "text": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "tiny": {
        "text": {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 2048,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        "vision": {
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 128,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
    },
}
# The limits that Qwen2.5-VL's published processor has been used with for documents: 1,280 visual tokens.
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}


def make_checkpoint(shape: str, directory: Path) -> None:
    """Writes random weights of a shape, with the built-in tokenizer, as a checkpoint folder."""
    import json

    import torch
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    from vlm.builtin.model import media_config, token_config, write_checkpoint

    text = {**SHAPES[shape]["text"], **token_config()}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=SHAPES[shape]["vision"], **media_config())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    directory.mkdir(parents=True)
    write_checkpoint(model, directory, processor_class="Qwen2_5_VLProcessor")
    settings = directory / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"size": PIXELS}))
    del model
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="source of images and texts")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/gpu_flow"))
    options = parser.parse_args()

    import torch

    from flows.cli import run_flow
    from tasks.summary import format_summary
    from vlm.config import RunConfig

    checkpoint = options.work_dir / f"random-{options.shape}"
    started = time.perf_counter()
    if not checkpoint.exists():
        make_checkpoint(options.shape, checkpoint)
    made = time.perf_counter() - started
    config = RunConfig.model_validate(
        {
            "model": {"name": str(checkpoint)},
            "data": {"sources": [options.data], "max_dropped_fraction": 0.5},
            "training": {"max_steps": options.steps, "log_every_steps": 1},
            "generation": {"max_rows": 4, "max_new_tokens": 32},
            "runtime": {"store": str(options.work_dir / "store")},
        }
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    summary = run_flow(config, None)
    print(format_summary(summary))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"))
    print(f"\n{device}; {versions}; Python {sys.version.split()[0]}; checkpoint made in {made:.0f} s\n")
    print("| step | wall s |\n|---|---|")
    for name, step in summary["steps"].items():
        print(f"| {name} | {step['wall_seconds']:.1f} |")
    if torch.cuda.is_available():
        print(f"\npeak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated")


if __name__ == "__main__":
    main()
