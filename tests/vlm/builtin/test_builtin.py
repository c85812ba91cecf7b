"""The built-in model and tokenizer: the same bytes everywhere, and good for the whole pipeline."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.tiny_models import tiny_conversation
from vlm.builtin import build_tokenizer, make_builtin_checkpoint
from vlm.builtin.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, corpus
from vlm.families import family_for_config
from vlm.processing import Processing


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_builtin_checkpoint(tmp_path_factory.mktemp("builtin"))


def test_another_process_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    code = "import sys, pathlib; from vlm.builtin import make_builtin_checkpoint; make_builtin_checkpoint(pathlib.Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
    )
    assert digests(tmp_path) == digests(folder)


def test_weights_are_those_of_the_recipe(folder: Path) -> None:
    """Pins the stream of random numbers: other bytes need another recipe version, or caches go stale."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    first = weights["lm_head.weight"][0, :4]
    assert torch.allclose(first, torch.tensor([0.15592, 0.03537, 0.08651, 0.19807]), atol=1e-5)


def test_sizes_suit_quantisation_and_stay_small(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert family_for_config(config).model_type == "qwen2_5_vl"
    for section, key in (("text_config", "hidden_size"), ("text_config", "intermediate_size"), ("vision_config", "hidden_size"),
                         ("vision_config", "intermediate_size"), ("text_config", "vocab_size")):  # fmt: skip
        assert config[section][key] % 64 == 0
    assert (folder / "model.safetensors").stat().st_size < 12e6
    full, depth = config["vision_config"]["fullatt_block_indexes"], config["vision_config"]["depth"]
    assert 0 < len(full) < depth


def test_tokenizer_round_trip_and_special_tokens() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == VOCAB_SIZE
    assert sorted(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))) == list(range(VOCAB_SIZE - 8, VOCAB_SIZE))
    text = "Total: 12.50 €\nÄpfel 日本 🎉"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("Transcribe the text in the image.")) <= 10
    assert corpus() == corpus()


def test_it_reads_an_image_and_learns(folder: Path) -> None:
    """A few steps on one conversation lower its loss a lot, and changing the image changes the logits."""
    from transformers import AutoModelForImageTextToText

    processing = Processing.from_dir(folder)
    messages, images = tiny_conversation()
    encoded = processing.encode(messages, [image.shape[:2] for image in images])
    ids = torch.tensor([encoded.input_ids])
    labels = torch.full_like(ids, -100)
    for first, last in encoded.assistant_spans:
        labels[0, first:last] = ids[0, first:last]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    inputs = processing.model_inputs(ids, processing.pixel_inputs(images))
    other = processing.model_inputs(ids, processing.pixel_inputs([255 - image for image in images]))
    with torch.no_grad():
        assert (model(input_ids=ids, **inputs).logits - model(input_ids=ids, **other).logits).abs().max() > 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=labels, **inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
