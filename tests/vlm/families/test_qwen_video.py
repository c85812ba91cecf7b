"""Videos of the Qwen families: patches against a slow reading of their definition, and whole batches through the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny_models import tiny_image
from tests.support.tiny_training import assert_same_gradients, fill, first_gradients, slow_reference
from tests.vlm.conftest import TinyRun
from vlm.config import DataConfig, LoraConfig
from vlm.data.prepare import prepare_dataset
from vlm.data.prepared import PreparedRow
from vlm.errors import DataError
from vlm.families import FAMILIES, Video
from vlm.generate import answer_rows, generating
from vlm.lora.build import build_adapter
from vlm.processing import Processing
from vlm.training.collator import VisionDataCollator

FAMILIES_WITH_VIDEO = tuple(name for name, family in FAMILIES.items() if family.video is not None)
PATCH, MERGE = 14, 2


def film(num_frames: int, height: int = 56, width: int = 84, seed: int = 0, fps: float = 2.0) -> Video:
    return Video(np.stack([tiny_image(height, width, seed + number) for number in range(num_frames)]), fps)


def row(processing: Processing, *media: Any, answer: str = "It moves.") -> PreparedRow:
    parts = [{"type": "video" if isinstance(medium, Video) else "image"} for medium in media]
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": "What happens?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    encoded = processing.encode(messages, [medium.shape[:-1] for medium in media])
    return PreparedRow(
        id="",
        group=None,
        messages=messages,
        images=list(media),
        input_ids=np.asarray(encoded.input_ids, np.int32),
        assistant_spans=encoded.assistant_spans,
        target=answer,
        metadata={},
    )


@pytest.fixture(params=FAMILIES_WITH_VIDEO)
def run(request: pytest.FixtureRequest, tiny_run: Callable[..., TinyRun]) -> TinyRun:
    return tiny_run(request.param)


@pytest.fixture
def rows(run: TinyRun) -> list[PreparedRow]:
    """A video, a video between images, an odd number of frames twice, an image, and no image at all."""
    processing = run.loaded.processing
    still = tiny_image(56, 56, 90)
    return [
        row(processing, film(4)),
        row(processing, still, film(2, 84, 56, 20, fps=0.5), still, answer="Yes"),
        row(processing, film(3, 56, 56, 40, fps=10), film(1, 56, 84, 60)),
        row(processing, still),
        row(processing),
    ]


def slow_patches(processing: Processing, video: Video) -> torch.Tensor:
    """Patch by patch: for each pair of frames, each merged square, each patch in it; channel, frame, row, column."""
    processor = processing.image_processor
    frames = list(video.frames)
    frames += frames[-1:] * (len(frames) % 2)
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    scaled = [((frame * processor.rescale_factor - mean) / std).transpose(2, 0, 1) for frame in frames]
    side = PATCH * MERGE
    patches = []
    for first in range(0, len(frames), 2):
        for top in range(0, scaled[0].shape[1], side):
            for left in range(0, scaled[0].shape[2], side):
                for y in (top, top + PATCH):
                    for x in (left, left + PATCH):
                        pair = [frame[:, y : y + PATCH, x : x + PATCH] for frame in scaled[first : first + 2]]
                        patches.append(np.stack(pair, axis=1).reshape(-1))
    return torch.tensor(np.array(patches), dtype=torch.float32)


def test_patches_and_grids(run: TinyRun) -> None:
    processing = run.loaded.processing
    videos = [film(4, fps=8), film(3, 28, 56, 10), film(1, 84, 28, 20)]
    made = processing.pixel_inputs([videos[:1], videos[1:]])
    # Both round to float32 once; the scales differ by an order of operations.
    expected = torch.cat([slow_patches(processing, video) for video in videos])
    torch.testing.assert_close(made["pixel_values_videos"], expected, atol=1e-6, rtol=1e-6)
    assert made["video_grid_thw"].tolist() == [[2, 4, 6], [2, 2, 4], [1, 6, 2]]
    assert made.get("second_per_grid_ts") == ([0.25, 1, 1] if run.loaded.family.model_type == "qwen2_5_vl" else None)
    # A still film of two frames is an image.
    still = tiny_image(56, 84)
    image = processing.pixel_inputs([[still]])["pixel_values"]
    assert torch.equal(processing.pixel_inputs([[Video(np.stack([still, still]), 2.0)]])["pixel_values_videos"], image)


def test_patches_are_those_of_the_stock_processor(run: TinyRun) -> None:
    pytest.importorskip("torchvision", reason="the stock video processor needs it")
    import transformers

    folder = run.checkpoint_dir / "processor"
    stock: Any = transformers.Qwen2VLVideoProcessor.from_pretrained(folder)
    videos = [film(4), film(3, 84, 56, 10)]
    processing = run.loaded.processing
    made = processing.pixel_inputs([videos])
    frames = [torch.from_numpy(video.frames.transpose(0, 3, 1, 2).copy()) for video in videos]
    out = stock(videos=frames, do_sample_frames=False, do_resize=False, return_tensors="pt")
    torch.testing.assert_close(made["pixel_values_videos"], out["pixel_values_videos"], atol=1e-5, rtol=1e-5)
    assert torch.equal(made["video_grid_thw"], out["video_grid_thw"])


def test_a_video_takes_its_place_in_the_text(run: TinyRun) -> None:
    processing = run.loaded.processing
    mixed = row(processing, tiny_image(56, 56), film(3))
    written = "<|image_pad|>" * 4 + "<|vision_end|><|vision_start|>" + "<|video_pad|>" * 2 * 6
    text = processing.tokenizer.decode(mixed.input_ids)
    assert text.startswith(f"<|im_start|>user\n<|vision_start|>{written}<|vision_end|>What happens?")
    encoded = processing.encode(mixed.messages, [(56, 56), (3, 56, 84)])
    assert encoded.num_visual_tokens == 16
    rendered = processing.render(mixed.messages)
    assert processing.encode_text(rendered, [(56, 56), (3, 56, 84)]).input_ids == mixed.input_ids.tolist()
    with pytest.raises(DataError, match="images and videos would change places"):
        processing.encode(mixed.messages, [(3, 56, 84), (56, 56)])
    with pytest.raises(DataError, match="places for 2 images but 1 images"):
        processing.encode(mixed.messages, [(56, 56)])
    typed = processing.encode([{"role": "user", "content": "a <|video_pad|>"}], [])
    assert processing.tokenizer.convert_tokens_to_ids("<|video_pad|>") not in typed.input_ids


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_batches_are_their_rows(run: TinyRun, rows: list[PreparedRow]) -> None:
    """Forward and gradients of a padded batch against row after row."""
    model: Any = run.loaded.model
    collate = VisionDataCollator(run.loaded.processing)
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        results = []
        for batches in ([rows], [[one] for one in rows]):
            total = torch.zeros(())
            logits = []
            for batch in batches:
                inputs = collate(batch)
                labels = inputs.pop("labels")
                out = model(**inputs, use_cache=False).logits
                total = total + torch.nn.functional.cross_entropy(
                    out[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
                )
                logits += [out[number, : len(one.input_ids)].detach() for number, one in enumerate(batch)]
            total.backward()
            results.append((logits, gradients(model)))
            model.zero_grad()
    finally:
        for parameter, before in learning:
            parameter.requires_grad_(before)
            parameter.grad = None
    for whole, single in zip(results[0][0], results[1][0], strict=True):
        # Sums of some hundred float32 terms in another order.
        torch.testing.assert_close(whole, single, atol=1e-5, rtol=1e-5)
    assert set(results[0][1]) == set(results[1][1])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=2e-5, rtol=1e-4)
    assert results[0][1]["model.visual.patch_embed.proj.weight"].abs().max() > 0


def test_the_pace_matters_where_positions_count_in_seconds(run: TinyRun) -> None:
    collate = VisionDataCollator(run.loaded.processing)
    logits = []
    for fps in (2.0, 0.25):
        inputs = collate([row(run.loaded.processing, film(4, fps=fps))])
        with torch.no_grad():
            logits.append(run.loaded.model(**inputs).logits)
    assert torch.equal(*logits) == (run.loaded.family.model_type == "qwen2_vl")


def test_video_tokens_carry_no_loss(run: TinyRun, rows: list[PreparedRow]) -> None:
    batch = VisionDataCollator(run.loaded.processing, train_on_prompts=True)(rows)
    video_id = run.loaded.processing.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert (batch["input_ids"] == video_id).sum() == 2 * 6 + 6 + 2 * 4 + 6
    learnt = batch["labels"][batch["labels"] != -100]
    assert not torch.isin(learnt, torch.tensor(sorted(run.loaded.processing.media_token_ids))).any()


def test_answers_do_not_depend_on_the_batch(run: TinyRun, rows: list[PreparedRow]) -> None:
    with generating(run.loaded.model):
        together = answer_rows(run.loaded.model, run.loaded.processing, rows, 6)
        apart = [answer_rows(run.loaded.model, run.loaded.processing, [one], 6)[0] for one in rows]
        other = answer_rows(run.loaded.model, run.loaded.processing, [row(run.loaded.processing, film(4, seed=70))], 6)
    assert together == apart
    assert other[0] != together[0]


def test_training_on_videos_is_the_slow_reference(tiny_run: Callable[..., TinyRun], tmp_path: Path) -> None:
    """From a source with frames to a step of our own trainer, against row after row through the model."""
    run = tiny_run("qwen2_5_vl")
    rows = []
    for number in range(3):
        frames = [f"{number}_{frame}.png" for frame in range(number + 3)]
        for frame, name in enumerate(frames):
            Image.fromarray(tiny_image(60, 80, 10 * number + frame)).save(tmp_path / name)
        parts = [{"type": "video", "video": frames, "fps": 4 * number + 1}, {"type": "text", "text": "What happens?"}]
        answer = {"role": "assistant", "content": f"Number {number}"}
        rows.append({"messages": [{"role": "user", "content": parts}, answer]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    data = DataConfig(sources=({"path": str(tmp_path / "rows.jsonl"), "split": "train"},), max_video_frames=4)
    (tmp_path / "dataset").mkdir()
    summary = prepare_dataset(data, run.loaded.processing, tmp_path / "dataset", num_workers=0)
    assert (summary.num_rows["train"], summary.num_dropped) == (3, 0)
    run = replace(run, dataset_dir=tmp_path / "dataset")
    (tmp_path / "one").mkdir()
    build_adapter(run.loaded, LoraConfig(rank=2), tmp_path / "one" / "initial")
    fill(tmp_path / "one" / "initial")
    loss, found = first_gradients(run, tmp_path / "one", LoraConfig(rank=2), batch_size=3, gradient_accumulation=1)
    expected_loss, expected = slow_reference(run, tmp_path / "one")
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert_same_gradients(found, expected)


def test_families_without_videos_say_so(tiny_run: Callable[..., TinyRun]) -> None:
    processing = tiny_run("pixtral").loaded.processing
    with pytest.raises(DataError, match=r"Pixtral takes no videos; use a model of Qwen2-VL or Qwen2\.5-VL"):
        processing.encode([{"role": "user", "content": [{"type": "video"}]}], [(2, 56, 56)])
