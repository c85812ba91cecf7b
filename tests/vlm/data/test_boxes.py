"""Boxes lie where they lay once their image is resized, and what cannot be told is dropped with an entry."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from pydantic import ValidationError

from tests.support.tiny_models import make_tiny_checkpoint
from vlm.config.data import BoxConfig
from vlm.data.boxes import BoxWriter, ResizedImage
from vlm.data.rows import RowError
from vlm.families import FAMILIES
from vlm.processing import Processing

# 400 wide and 200 high, seen at 100 x 100: x is divided by 4, y by 2.
IMAGE = ResizedImage((200, 400), (100, 100))
BOX = "[40, 20, 80, 100]"


def write(text, *, images=(IMAGE,), family="absolute", **settings):
    return BoxWriter(BoxConfig(**({"source": "absolute"} | settings)), family).text(text, images)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f'{{"bbox_2d": {BOX}, "label": "a 40"}}', '{"bbox_2d": [10, 10, 20, 50], "label": "a 40"}'),
        (f'```json\n[\n  {{"bbox":{BOX}}},\n  {{"box": []}}\n]\n```', '```json\n[\n  {"bbox":[10, 10, 20, 50]},\n  {"box": []}\n]\n```'),
        ('Here: {"point_2d":[ 41.9,\t7 ]} and 40', 'Here: {"point_2d":[ 10,\t4 ]} and 40'),
        ("{'bbox': [[40, 20, 80, 100], [0, 0, 400, 2e2]]}", "{'bbox': [[10, 10, 20, 50], [0, 0, 100, 100]]}"),
        ('{"box": [{"bbox": [40, 20, 80, 100]}]}', '{"box": [{"bbox": [10, 10, 20, 50]}]}'),
        ('{"point": [[4, 2], [8, 4], [400, 200]]}', '{"point": [[1, 1], [2, 2], [100, 100]]}'),
        ('{"bbox": [4, 2, 8, 2, 8, 4]}', '{"bbox": [1, 1, 2, 1, 2, 2]}'),
        ('{"bbox": null, "total": [40, 20, 80, 100]}', '{"bbox": null, "total": [40, 20, 80, 100]}'),
        (f" {BOX} ", " [10, 10, 20, 50] "),
        ("[40, 20]", "[40, 20]"),  # a list of numbers like any other
        (f"The box is {BOX}.", f"The box is {BOX}."),
        (
            "<|object_ref_start|>a<|object_ref_end|><|box_start|>(40,20),(80,100)<|box_end|>",
            "<|object_ref_start|>a<|object_ref_end|><|box_start|>(10,10),(20,50)<|box_end|>",
        ),
        ("<|box_start|>(40, 20)<|box_end|>", "<|box_start|>(10, 10)<|box_end|>"),
        (
            "<|ref|>40<|/ref|><|det|>[[40, 20, 80, 100], [4, 2, 8, 4]]<|/det|>",
            "<|ref|>40<|/ref|><|det|>[[10, 10, 20, 50], [1, 1, 2, 2]]<|/det|>",
        ),
    ],
)  # fmt: skip
def test_only_coordinates_are_written_anew(text, expected):
    assert write(text) == expected
    assert write(text, source="none") == text


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        ({"target": "normalized_1000"}, BOX, "[100, 100, 200, 500]"),
        ({"target": "normalized_999"}, "[0, 0, 400, 200]", "[0, 0, 999, 999]"),
        ({"target": "normalized_1"}, BOX, "[0.1, 0.1, 0.2, 0.5]"),
        ({"source": "normalized_1"}, "[0.1, 0.105, 1.0, 1]", "[10, 10, 100, 100]"),
        ({"source": "normalized_1000"}, "[100, 100, 200, 500]", "[10, 10, 20, 50]"),
        ({"source": "normalized_1000", "target": "normalized_999"}, "[0, 500, 501, 1000]", "[0, 500, 500, 999]"),
        ({"family": "normalized_1000"}, BOX, "[100, 100, 200, 500]"),
        ({"layout": "xywh"}, '{"bbox": [40, 20, 40, 80]}', '{"bbox": [10, 10, 20, 50]}'),
        ({"layout": "xywh"}, f"<|det|>[{BOX}]<|/det|>", "<|det|>[[10, 10, 20, 50]]<|/det|>"),
        (
            {"json_keys": ["where"]},
            f'{{"where": {BOX}, "bbox": {BOX}}}',
            f'{{"where": [10, 10, 20, 50], "bbox": {BOX}}}',
        ),
    ],
)
def test_conventions(settings, text, expected):
    assert write(text, **settings) == expected


@pytest.mark.parametrize("source", ["absolute", "normalized_1", "normalized_999", "normalized_1000"])
@pytest.mark.parametrize("target", ["absolute", "normalized_1", "normalized_999", "normalized_1000"])
def test_mapped_back_a_box_is_where_it_was(source, target):
    """To within half a unit of the target, which for pixels is half a resized pixel."""
    random = np.random.default_rng(0)
    scales = {"normalized_1": 1, "normalized_999": 999, "normalized_1000": 1000}
    for _ in range(50):
        image = ResizedImage(tuple(random.integers(30, 3000, 2)), tuple(random.integers(28, 1500, 2)))
        box = np.sort(random.uniform(0.01, 1, (2, 2)), axis=0)  # corners, relative
        before, after = (
            np.array([scales[name]] * 2 if name in scales else size[::-1], float)
            for name, size in ((source, image.before), (target, image.after))
        )
        text = write(json.dumps((box * before).ravel().tolist()), images=[image], source=source, target=target)
        moved = np.array(json.loads(text)).reshape(2, 2) / after
        unit = 1e-4 if target == "normalized_1" else 1 / after
        assert (abs(moved - box) <= 0.5 * unit + 1e-9).all()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"bbox": [1, 2, 3]}', "bad_box"),
        ('{"bbox": [[1, 2, 3, 4], [1]]}', "bad_box"),
        ('{"bbox": {"x1": 1}}', "bad_box"),
        ('{"bbox": "40, 20, 80, 100"}', "bad_box"),
        ('{"bbox": [40, 20, 80, true]}', "bad_box"),
        ('{"bbox": [[[[40, 20, 80, 100]]]]}', "bad_box"),
        ('{"bbox": [40, 20, 80, 1e999]}', "bad_box"),
        (f'{{"bbox": [40, 20, 80, {10**400}]}}', "bad_box"),
        ('{"bbox": [40, 20, 80', "bad_box"),
        ("<|box_start|>(40,20),(80,100)", "bad_box"),
        ("<|box_start|>40,20,80,100<|box_end|>", "bad_box"),
        ("<|det|>(40, 20)<|/det|>", "bad_box"),
        (f"<|box_start|>{'(1234567,1234567)  ' * 200}x<|box_end|>", "bad_box"),
        (f'{{"bbox": {"[" * 100_000}', "bad_box"),
        (f'{{"bbox": {"[" * 5000}{"]" * 5000}}}', "bad_box"),
        ('{"bbox": [80, 20, 40, 100]}', "box_reversed"),
        ('{"bbox": [0.1, 0.1, 0.2, 0.5]}', "box_too_small"),
        ('{"bbox": [40, 20, 401, 100]}', "box_outside"),
        ('{"bbox": [-1, 20, 40, 100]}', "box_outside"),
        ('{"point": [40, 201]}', "box_outside"),
    ],
)
def test_what_is_no_box_is_an_error(text, reason):
    with pytest.raises(RowError) as raised:
        write(text)
    assert raised.value.reason == reason


def test_clipping():
    clip = BoxWriter(BoxConfig(source="absolute", on_outside="clip"), "absolute")
    assert clip.text('{"bbox": [-8, 20, 80, 300]} {"bbox": [40, 20, 400, 200]}', [IMAGE]) == (
        '{"bbox": [0, 10, 20, 100]} {"bbox": [10, 10, 100, 100]}',
        1,
    )
    for text in ('{"bbox": [401, 20, 480, 100]}', '{"point": [401, 20]}'):  # nothing of it is inside
        with pytest.raises(RowError, match="leaves its image"):
            clip.text(text, [IMAGE])


def part(text):
    return {"type": "image"} if text is None else {"type": "text", "text": text}


def turns(*contents):
    return [
        {"role": ("user", "assistant")[number % 2], "content": [part(text) for text in content]}
        for number, content in enumerate(contents)
    ]


SMALL = ResizedImage((100, 100), (50, 50))


@pytest.mark.parametrize(
    ("messages", "images", "expected"),
    [
        (turns([None, "What is at [40, 20, 80, 100]?"], [BOX]), [IMAGE], "[10, 10, 20, 50]"),
        (turns([None, None, "?"], [BOX]), [IMAGE, IMAGE], "[10, 10, 20, 50]"),
        (turns([None, "?"], ["a"], [None, "?"], [BOX]), [IMAGE, SMALL], "[20, 10, 40, 50]"),
        (turns([None, "?"], ["a"], ["?"], [BOX]), [IMAGE], "[10, 10, 20, 50]"),
    ],
)
def test_a_box_belongs_to_the_nearest_images(messages, images, expected):
    written, _ = BoxWriter(BoxConfig(source="absolute"), "absolute")(messages, images)
    assert written[-1]["content"][0]["text"] == expected
    assert written[:-1] == messages[:-1]  # what stands in a sentence without a key is no box
    prompt = turns([None, '{"bbox": [40, 20, 80, 100]}'], ["a"])
    assert BoxWriter(BoxConfig(source="absolute"), "absolute")(prompt, [IMAGE])[0][0]["content"][1]["text"] == (
        '{"bbox": [10, 10, 20, 50]}'
    )


def test_an_image_that_cannot_be_told_is_an_error_unless_it_does_not_matter():
    messages = turns([None, None, "?"], [BOX])
    with pytest.raises(RowError, match="any of 2 images of different size"):
        BoxWriter(BoxConfig(source="absolute"), "absolute")(messages, [IMAGE, SMALL])
    with pytest.raises(RowError, match="before the first image"):
        BoxWriter(BoxConfig(source="absolute"), "absolute")(turns(["?"], [BOX]), [])
    relative = BoxWriter(BoxConfig(source="normalized_1000"), "normalized_999")
    assert relative(messages, [IMAGE, SMALL])[0][-1]["content"][0]["text"] == "[40, 20, 80, 100]"


def test_prepared_rows_have_the_boxes_of_their_final_size(encode_image, make_image, write_parquet, prepare, processing):
    png = encode_image(make_image(0, (300, 200)))
    answer = '{"bbox_2d": [30, 20, 150, 100]}'
    rows = [
        {"id": "good", "image": png, "question": answer, "text": answer},
        {"id": "several", "image": png, "text": [answer, '{"bbox_2d": [0, 0, 300, 200]}']},
        {"id": "bad", "image": png, "text": '{"bbox_2d": [30, 20, 15, 100]}'},
        {"id": "outside", "image": png, "text": '{"bbox_2d": [30, 20, 400, 100]}'},
    ]
    path = write_parquet(rows[:1] + rows[2:], "a.parquet")
    several = write_parquet(rows[1:2], "b.parquet")
    sources = [{"path": str(place), "split": "train"} for place in (path, several)]
    boxes = {"source": "absolute", "on_outside": "clip"}
    prepared = prepare(sources=sources, boxes=boxes)
    assert [(entry["id"], entry["action"], entry["reason"]) for entry in prepared.ledger] == [
        ("bad", "dropped", "box_reversed"),
        ("outside", "warning", "box_clipped"),
    ]
    made = prepared.all_rows()
    assert made["good"].images[0].shape == (196, 308, 3)
    # 30 * 308 / 300, 20 * 196 / 200, …
    assert made["good"].target == '{"bbox_2d": [31, 20, 154, 98]}'
    assert made["good"].messages[0]["content"][1]["text"] == made["good"].target
    assert made["several"].metadata["answers"] == ['{"bbox_2d": [31, 20, 154, 98]}', '{"bbox_2d": [0, 0, 308, 196]}']
    assert made["outside"].target == '{"bbox_2d": [31, 20, 308, 98]}'

    limit = len(made["good"].input_ids) - 40
    shrunk = prepare(path, boxes=boxes, max_length_tokens=limit, on_too_long="shrink_images").all_rows()["good"]
    height, width, _ = shrunk.images[0].shape
    assert height * width < 196 * 308
    assert shrunk.target == json.dumps(
        {"bbox_2d": [round(x) for x in (width / 10, height / 10, width / 2, height / 2)]}
    )
    encoded = processing.encode(shrunk.messages, [(height, width)])
    assert (shrunk.input_ids.tolist(), shrunk.assistant_spans) == (encoded.input_ids, encoded.assistant_spans)
    start, end = shrunk.assistant_spans[0]
    assert bytes(id_ - 10 for id_ in shrunk.input_ids[start : end - 1]).decode() == shrunk.target


def test_settings_without_effect_are_refused():
    with pytest.raises(ValidationError, match=r"data\.boxes\.layout has no effect while data\.boxes\.source is 'none'"):
        BoxConfig(layout="xywh")


def test_what_families_are_used_to():
    conventions = {name: family.box_convention for name, family in FAMILIES.items()}
    assert conventions["qwen2_5_vl"] == "absolute"
    assert conventions["deepseek_ocr"] == conventions["deepseek_ocr2"] == "normalized_999"
    assert conventions["qwen2_vl"] == conventions["mllama"] == conventions["pixtral"] == "normalized_1000"


def test_marks_of_boxes_are_tokens_where_the_tokenizer_has_them(tmp_path):
    folder = make_tiny_checkpoint("qwen2_vl", tmp_path / "source")
    plain = Processing.from_dir(folder)
    marks = ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"]
    shutil.copytree(folder, tmp_path / "marked")
    plain.tokenizer.add_special_tokens({"extra_special_tokens": marks})
    plain.tokenizer.save_pretrained(tmp_path / "marked")
    processing = Processing.from_dir(tmp_path / "marked")
    text = "<|object_ref_start|>a<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    encoded = processing.encode(turns(["where?"], [text]), [])
    ((start, end),) = encoded.assistant_spans
    words = encoded.input_ids[start:end]
    assert [id_ for id_ in words if id_ in processing.tokenizer.convert_tokens_to_ids(marks)] == (
        processing.tokenizer.convert_tokens_to_ids(marks)
    )
    assert processing.decode(words) == text
