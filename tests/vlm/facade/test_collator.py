import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlm
from tests.support.tiny_models import TINY_FAMILIES, tiny_image
from tests.support.tiny_runs import batch_of
from vlm.data.prepared import PreparedDataset
from vlm.errors import ConfigError, DataError
from vlm.training.collator import VisionDataCollator as CoreCollator


def row(image: Any, answer: str = "Total 12.50") -> dict[str, Any]:
    question = [{"type": "image", "image": image}, {"type": "text", "text": "Transcribe the text in the image."}]
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    }


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert set(left) == set(right)
    for name in left:
        # Pixels are a list of tensors where images of one row differ in their number of views.
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("model_type", TINY_FAMILIES)
def test_batches_are_those_of_prepared_rows(
    load: Callable, tiny_run: Callable, rows_of: Callable, model_type: str
) -> None:
    run = tiny_run(model_type)
    model, processor = load(model_type)
    rows = rows_of(run.dataset_dir)[:4]
    ours = vlm.VisionDataCollator(model, processor, train_on_responses_only=True)(rows)
    assert_equal(ours, batch_of(run.loaded, run.dataset_dir, "train", range(4)))
    prepared = [PreparedDataset(run.dataset_dir, "train")[number] for number in range(4)]
    everything = CoreCollator(run.loaded.processing, train_on_prompts=True)(prepared)
    assert_equal(vlm.VisionDataCollator(model, processor)(rows), everything)
    padded = vlm.VisionDataCollator(model, processor, pad_to_multiple_of=64)(rows)
    assert padded["labels"].shape[1] % 64 == 0
    length = everything["labels"].shape[1]
    assert torch.equal(padded["labels"][:, :length], everything["labels"])
    assert (padded["labels"][:, length:] == -100).all()
    assert not padded["attention_mask"][:, length:].any()


def test_an_image_may_come_in_any_form(load: Callable, tmp_path: Path) -> None:
    model, processor = load("qwen2_5_vl")
    collate = vlm.VisionDataCollator(model, processor)
    pixels = tiny_image(90, 130)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    forms = [
        pixels,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        f"file://{tmp_path}/a.png",
        data,
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        uri,
    ]
    expected = collate([row(picture)])
    for form in forms:
        assert_equal(collate([row(form)]), expected)
    as_url = row(None)
    as_url["messages"][0]["content"][0] = {"type": "image_url", "image_url": {"url": uri}}
    beside = {**row(None), "images": [picture]}
    for other in (as_url, beside, row(picture)["messages"]):
        assert_equal(collate([other]), expected)
    in_workers = torch.utils.data.DataLoader([row(picture)], collate_fn=collate, num_workers=1)
    assert_equal(next(iter(in_workers)), expected)


def test_the_users_image_is_left_as_it_is(load: Callable) -> None:
    model, processor = load("qwen2_5_vl")
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(tiny_image(56, 112)).save(buffer, "PNG", exif=exif)
    picture = Image.open(buffer)
    batch = vlm.VisionDataCollator(model, processor)([row(picture)])
    assert batch["image_grid_thw"].tolist() == [[1, 8, 4]]  # upright in the batch
    assert picture.size == (112, 56)
    assert picture.getexif()[0x0112] == 6


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({}, [1, 8, 16]),
        ({"resize": "max"}, [1, 8, 16]),
        ({"resize": "min"}, [1, 8, 16]),  # 224 wide is under the 512 of models that take any size
        ({"resize": 112}, [1, 4, 8]),
        ({"resize": 112, "resize_dimension": 1}, [1, 8, 16]),
        ({"resize": 56, "resize_dimension": 1}, [1, 4, 8]),
        ({"resize": 112, "resize_dimension": "max"}, [1, 4, 8]),
        ({"resize": 56, "resize_dimension": "min"}, [1, 4, 8]),
        ({"resize": (56, 84)}, [1, 6, 4]),
    ],
)
def test_resizing(load: Callable, options: dict[str, Any], grid: list[int]) -> None:
    model, processor = load("qwen2_5_vl")
    picture = Image.fromarray(tiny_image(112, 224))
    batch = vlm.VisionDataCollator(model, processor, **options)([row(picture)])
    assert batch["image_grid_thw"].tolist() == [grid]


def test_shrinking_to_the_models_size(load: Callable) -> None:
    model, processor = load("qwen2_5_vl")
    model.config.vision_config.image_size = 112
    batch = vlm.VisionDataCollator(model, processor, resize="min")([row(tiny_image(112, 224))])
    assert batch["image_grid_thw"].tolist() == [[1, 4, 8]]


def test_long_conversations(load: Callable) -> None:
    model, processor = load("qwen2_5_vl", max_seq_length=60)
    whole = vlm.VisionDataCollator(model, processor, 4096, train_on_responses_only=True)
    long = row(tiny_image(), "word " * 80)
    uncut = whole([long])
    assert uncut["input_ids"].shape[1] > 60
    collate = vlm.VisionDataCollator(model, processor, train_on_responses_only=True)
    with pytest.warns(UserWarning, match="cut to max_seq_length 60"):
        cut = collate([long])
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(cut[name], uncut[name][:, :60])
    collate([long])  # said once
    with pytest.raises(DataError, match="cut off all that the assistant says"):
        vlm.VisionDataCollator(model, processor, 24, train_on_responses_only=True)([long])
    with pytest.raises(DataError, match="would cut image tokens off; raise max_seq_length"):
        collate([row(tiny_image(280, 280))])


def test_formatting(load: Callable) -> None:
    model, processor = load("qwen2_vl")
    picture = tiny_image()
    collate = vlm.VisionDataCollator(
        model, processor, formatting_func=lambda sample: row(sample["scan"], sample["words"])
    )
    plain = vlm.VisionDataCollator(model, processor)
    assert_equal(collate([{"scan": picture, "words": "Bread"}]), plain([row(picture, "Bread")]))


@pytest.mark.parametrize(
    ("parts", "good"),
    [
        ({"response_part": "<|im_start|>assistant\n"}, True),
        ({"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}, True),
        ({"response_part": "<|im_start|>assistant"}, False),
        ({"response_part": "<|im_start|>assistant", "force_match": False}, True),
        ({"response_part": "<|start_header_id|>assistant<|end_header_id|>\n\n"}, False),
        ({"instruction_part": "<|start_header_id|>user<|end_header_id|>\n\n"}, False),
        ({"response_part": " "}, False),
    ],
)
def test_parts_of_the_template_are_checked(load: Callable, parts: dict[str, Any], good: bool) -> None:
    model, processor = load("qwen2_vl")
    if good:
        batch = vlm.VisionDataCollator(model, processor, train_on_responses_only=True, **parts)([row(tiny_image())])
        labels = batch["labels"][batch["labels"] != -100]
        assert processor.decode(labels) == "Total 12.50<|im_end|>"
    else:
        with pytest.raises(ConfigError, match="is not what this model's chat template writes"):
            vlm.VisionDataCollator(model, processor, train_on_responses_only=True, **parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response_part": "<|im_start|>assistant\n"}, "no effect without train_on_responses_only=True"),
        ({"ignore_index": 0}, "leave it at -100"),
        ({"num_proc": 4}, "dataloader_num_workers"),
        ({"completion_only_loss": False}, "nothing to learn"),
        ({"resize": "huge"}, "resize 'huge' is unknown"),
        ({"resize": (0, 5)}, "is unknown"),
        ({"resize_dimension": "max"}, "no effect with resize='max'"),
        ({"resize": 100, "resize_dimension": 2}, "resize_dimension 2 is unknown"),
        ({"pad_to_multiple_of": 0}, "must be positive"),
    ],
)
def test_options_without_effect_are_refused(load: Callable, options: dict[str, Any], message: str) -> None:
    model, processor = load("qwen2_vl")
    with pytest.raises(ConfigError, match=message):
        vlm.VisionDataCollator(model, processor, **options)


def test_another_models_processor_is_refused(load: Callable) -> None:
    model, _ = load("qwen2_vl")
    _, other = load("qwen2_vl")
    with pytest.raises(ConfigError, match="not the processor that came with this model"):
        vlm.VisionDataCollator(model, other)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(None), "image parts without a reference"),
        (row("nowhere.png"), "nowhere.png.*No such file"),
        (row(b"not an image"), "not an image of a known format"),
        (row("https://example.com/a.png"), "allow_urls is off; give allow_urls=True"),
        (row(np.zeros((4, 4, 3))), "float64"),
        ({"text": "a"}, "no 'messages'"),
        ({"messages": row(tiny_image())["messages"][:1]}, "does not end with the assistant's answer"),
    ],
)
def test_bad_rows_say_what_is_wrong(load: Callable, bad: Any, message: str) -> None:
    model, processor = load("qwen2_vl")
    with pytest.raises(DataError, match=message):
        vlm.VisionDataCollator(model, processor)([bad])


def test_boxes_follow_their_image(load: Callable) -> None:
    """An image of 200 x 100 pixels is shrunk to a width of 84 first, and then fitted to whole patches of 28."""
    model, processor = load("qwen2_5_vl")
    image = tiny_image(100, 200)
    boxes = {"source": "absolute"}
    ours = vlm.VisionDataCollator(model, processor, resize=84, boxes=boxes)
    (height, width) = (int(side) * 14 for side in ours([row(image, "a")])["image_grid_thw"][0, 1:])
    assert width == 84
    found = ours([row(image, '{"bbox_2d": [20, 10, 200, 100]}')])
    answer = f'{{"bbox_2d": [{round(0.1 * width)}, {round(0.1 * height)}, {width}, {height}]}}'
    assert_equal(found, vlm.VisionDataCollator(model, processor, resize=84)([row(image, answer)]))
    with pytest.raises(DataError, match="ends before it starts"):
        ours([row(image, '{"bbox_2d": [20, 10, 2, 100]}')])
    with pytest.raises(ConfigError, match=r"boxes=.*has no effect while data\.boxes\.source is 'none'"):
        vlm.VisionDataCollator(model, processor, boxes={"layout": "xywh"})
