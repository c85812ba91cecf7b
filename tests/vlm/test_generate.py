import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm import generate
from vlm.config import GenerationConfig, LoraConfig
from vlm.data.prepared import PreparedDataset
from vlm.errors import DataError, ResourceError
from vlm.evaluation.predictions import read_predictions
from vlm.families import FAMILIES
from vlm.generate import answer_rows, generate_predictions, generating, prompt_of
from vlm.lora.build import build_adapter

NUM_NEW = 6


def slow_answer(run: Any, row: Any, num_new: int) -> list[int]:
    """Greedy by hand: one row, no padding, no cache, the whole sequence again for every token."""
    processing, model = run.loaded.processing, run.loaded.model
    messages = [message for message in row.messages if message["role"] != "assistant"]
    ids = processing.encode(messages, [image.shape[:2] for image in row.images], add_generation_prompt=True).input_ids
    start = len(ids)
    for _ in range(num_new):
        tokens = torch.tensor([ids])
        inputs = processing.model_inputs(tokens, processing.pixel_inputs([row.images]))
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **inputs, use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] in processing.stop_token_ids:
            break
    return ids[start:]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_batched_answers_are_single_answers_in_row_order(tiny_run: Callable, tmp_path: Path, model_type: str) -> None:
    run = tiny_run(model_type)
    rows = PreparedDataset(run.dataset_dir, "test")
    settings = GenerationConfig(batch_size=4, max_new_tokens=NUM_NEW)
    summary = generate_predictions(run.loaded, run.dataset_dir, settings, tmp_path / "batched")
    generate_predictions(
        run.loaded, run.dataset_dir, settings.model_copy(update={"batch_size": 1}), tmp_path / "single"
    )
    for file in ("predictions.jsonl", "predictions.json"):
        assert (tmp_path / "batched" / file).read_bytes() == (tmp_path / "single" / file).read_bytes()
    _, predictions = read_predictions(tmp_path / "batched")
    assert [prediction.id for prediction in predictions] == rows.ids
    assert not summary.use_adapter
    for row, prediction in zip(rows, predictions, strict=True):
        tokens = slow_answer(run, row, NUM_NEW)
        assert prediction.prediction == run.loaded.processing.decode(tokens)
        assert prediction.target == row.target
        assert prediction.num_new_tokens == len(tokens)
        assert prediction.prompt == "Transcribe the text in the image."


def test_the_adapter_changes_the_answers_and_is_gone_afterwards(tiny_run: Callable, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = tiny_run("qwen2_5_vl")
    settings = GenerationConfig(batch_size=2, max_new_tokens=NUM_NEW, max_rows=2)
    build_adapter(run.loaded, LoraConfig(rank=2), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: tensor + 0.3 for key, tensor in load_file(file).items()}, file)
    answers = []
    for name, adapter_dir in (("base", None), ("tuned", tmp_path / "adapter"), ("again", None)):
        summary = generate_predictions(run.loaded, run.dataset_dir, settings, tmp_path / name, adapter_dir=adapter_dir)
        assert summary.use_adapter == (name == "tuned")
        answers.append([row.prediction for row in read_predictions(tmp_path / name)[1]])
    assert answers[0] == answers[2] != answers[1]
    assert len(answers[0]) == 2


def test_a_stop_token_ends_an_answer_and_is_counted(tiny_run: Callable, tmp_path: Path) -> None:
    run = tiny_run("qwen2_5_vl")
    row = PreparedDataset(run.dataset_dir, "test")[0]
    tokens = slow_answer(run, row, NUM_NEW)
    stop = tokens[2]  # whatever the random model says third now counts as the end
    processing = run.loaded.processing
    before = processing.stop_token_ids
    processing.stop_token_ids = (stop,)
    try:
        with generating(run.loaded.model):
            answer = answer_rows(run.loaded.model, processing, [row], NUM_NEW)[0]
    finally:
        processing.stop_token_ids = before
    end = tokens.index(stop)
    assert answer == generate.Answer(processing.decode(tokens[:end]), end + 1, stopped=True)


def test_training_mode_and_recomputation_are_off_while_generating_and_back_afterwards(tiny_run: Callable) -> None:
    run = tiny_run("qwen2_vl")
    model = run.loaded.model
    row = PreparedDataset(run.dataset_dir, "test")[0]
    expected = slow_answer(run, row, NUM_NEW)
    layer = model.model.language_model.layers[0]
    model.train()
    model.model.visual.eval()  # a mixed state must come back as it was
    layer.gradient_checkpointing = True
    try:
        with generating(model):
            answer = answer_rows(model, run.loaded.processing, [row], NUM_NEW)[0]
        assert model.training
        assert layer.training
        assert layer.gradient_checkpointing
        assert not model.model.visual.training
    finally:
        layer.gradient_checkpointing = False
        model.eval()
    assert answer.text == run.loaded.processing.decode(expected)


def test_a_batch_that_does_not_fit_is_halved(tiny_run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run("qwen2_5_vl")
    rows = [PreparedDataset(run.dataset_dir, "test")[number] for number in range(5)]
    sizes: list[int] = []

    def limited(model: Any, processing: Any, batch: Any, max_new_tokens: int, limit: int = 2) -> list[generate.Answer]:
        sizes.append(len(batch))
        if len(batch) > limit:
            raise torch.OutOfMemoryError("too much")
        return [generate.Answer(row.id, 1, True) for row in batch]

    monkeypatch.setattr(generate, "_answer", limited)
    answers = answer_rows(run.loaded.model, run.loaded.processing, rows, NUM_NEW)
    assert [answer.text for answer in answers] == [row.id for row in rows]
    assert sizes == [5, 2, 3, 1, 2]
    monkeypatch.setattr(generate, "_answer", lambda *arguments: limited(*arguments, limit=0))
    with pytest.raises(ResourceError, match=r"row 'test-0' .* lower data.max_pixels"):
        answer_rows(run.loaded.model, run.loaded.processing, rows[:1], NUM_NEW)


def test_the_prompt_ends_before_the_last_answer(tiny_run: Callable) -> None:
    row = PreparedDataset(tiny_run("qwen2_5_vl").dataset_dir, "test")[0]
    first, answer = row.messages
    image = {"role": "user", "content": [{"type": "image"}]}
    several = dataclasses.replace(row, messages=[first, answer, image, answer])
    messages, num_images = prompt_of(several)
    assert messages == [first, answer, image]
    assert num_images == 2
    with pytest.raises(DataError, match="no assistant turn"):
        prompt_of(dataclasses.replace(row, messages=[first]))
