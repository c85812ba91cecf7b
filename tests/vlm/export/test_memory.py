"""An export of a whole model needs memory for one file of it, not for the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import PROJECT
from tests.support.tiny_runs import make_checkpoint
from vlm.config import LoraConfig
from vlm.export.shards import ShardWriter
from vlm.export.stored_weights import stored_names
from vlm.families import FAMILIES
from vlm.loading.checkpoint import LoadedModel
from vlm.loading.model_config import model_config
from vlm.loading.quantization import blueprint
from vlm.lora.build import build_adapter
from vlm.processing import Processing

SHARD_MB = 20
WIDTH, MLP_WIDTH, NUM_LAYERS = 1024, 2048, 12

# What importing takes is not the export's; nor is the peak of this process, which `ru_maxrss` hands on to its children.
EXPORT = """
import re, sys
from pathlib import Path
from vlm.export import export
from vlm.export import merged
def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
checkpoint, adapter, output = map(Path, sys.argv[1:4])
merged.MergedModel(checkpoint, adapter, "cpu")
before = peak_kib()
export("merged_16bit", checkpoint, adapter, output, max_shard_size_mb=int(sys.argv[4]), device="cpu")
print(peak_kib() - before)
"""


def make_large_checkpoint(folder: Path) -> LoadedModel:
    """A bfloat16 checkpoint of 230 MB in shards, and its model without values."""
    checkpoint = make_checkpoint("qwen2_vl", folder)
    model_dir, family = checkpoint / "model", FAMILIES["qwen2_vl"]
    config = json.loads((model_dir / "config.json").read_text())
    config["vision_config"]["hidden_size"] = WIDTH
    config["text_config"] |= {
        "hidden_size": WIDTH,
        "intermediate_size": MLP_WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "layer_types": ["full_attention"] * NUM_LAYERS,
        "num_attention_heads": WIDTH // 128,
        "num_key_value_heads": WIDTH // 256,
    }
    config["text_config"]["rope_parameters"]["mrope_section"] = [16, 24, 24]
    (model_dir / "config.json").write_text(json.dumps(config))
    for path in model_dir.glob("*.safetensors"):
        path.unlink()
    bare = blueprint(family, model_config(model_dir, family)).to(torch.bfloat16)
    noise = 0.02 * torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    writer, key_of = ShardWriter(model_dir, SHARD_MB * 1_000_000), stored_names(bare)
    for name, like in bare.state_dict().items():
        values = noise.repeat(-(-like.numel() // len(noise)))
        writer.add(key_of[name], values[: like.numel()].view(like.shape))
    writer.finish()
    path = checkpoint / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    processing = Processing.from_dir(checkpoint / "processor")
    return LoadedModel(bare.to_empty(device="cpu"), processing, family, "cpu", "bfloat16", checkpoint)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of memory where Linux tells it")
def test_a_merged_model_is_never_whole_in_memory(tmp_path: Path) -> None:
    loaded = make_large_checkpoint(tmp_path)
    build_adapter(loaded, LoraConfig(rank=4), tmp_path / "adapter")
    command = [sys.executable, "-c", EXPORT, loaded.checkpoint_dir, tmp_path / "adapter", tmp_path / "out", SHARD_MB]
    # Weights of real models are large enough for the allocator to give each back at once. Of these, it would keep most
    # for later, which says nothing of what the export holds.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout) * 1024
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 8
    # The file being written, once more while it is, and the weight being merged: as stored, its update, the sum and what
    # that is rounded from, float32 each, and one more.
    allowed = 2 * max(sizes) + 5 * 4 * WIDTH * MLP_WIDTH
    assert grown < allowed
    assert allowed < sum(sizes) / 2
