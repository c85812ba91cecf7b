from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlm
from tests.support.tiny_models import TINY_FAMILIES, fitted, tiny_conversation, tiny_image
from vlm.errors import ConfigError, DataError
from vlm.families import Video
from vlm.processing import Processing


def with_images(messages: list[dict[str, Any]], images: list[np.ndarray]) -> list[dict[str, Any]]:
    waiting = iter(images)
    return [
        {
            **message,
            "content": [
                {"type": "image", "image": Image.fromarray(next(waiting))} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


@pytest.mark.parametrize("model_type", TINY_FAMILIES)
def test_inputs_are_those_of_the_core(load: Callable, model_type: str) -> None:
    _, processor = load(model_type)
    core = processor.processing
    questions = [tiny_conversation(image_sizes=((56, 84), (84, 56))), tiny_conversation(image_sizes=((56, 140),))]
    texts = [processor.apply_chat_template(messages[:1], add_generation_prompt=True) for messages, _ in questions]
    images = [Image.fromarray(image) for _, own in questions for image in own]
    batch = processor(images, texts, add_special_tokens=False, return_tensors="pt")
    rows = [
        core.encode(messages[:1], [image.shape[:2] for image in own], add_generation_prompt=True).input_ids
        for messages, own in questions
    ]
    for number, row in enumerate(rows):  # padded on the left, for generation
        assert batch["input_ids"][number, -len(row) :].tolist() == row
        assert batch["attention_mask"][number].sum() == len(row)
    pixels = core.pixel_inputs([fitted(core, own) for _, own in questions])
    for name, tensor in core.model_inputs(batch["input_ids"], pixels).items():
        torch.testing.assert_close(batch[name], tensor, rtol=0, atol=0)
    from_messages = processor.apply_chat_template(
        [with_images(messages[:1], own) for messages, own in questions],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert set(from_messages) == set(batch)
    torch.testing.assert_close(dict(from_messages), dict(batch), rtol=0, atol=0)
    assert torch.equal(
        processor.apply_chat_template(with_images(*questions[0]), tokenize=True, return_dict=False)[0],
        torch.tensor(core.encode(questions[0][0], [image.shape[:2] for image in questions[0][1]]).input_ids),
    )
    right = processor(text=texts, images=images, padding_side="right", padding=True)
    assert right["input_ids"][1, : len(rows[1])].tolist() == rows[1]


@pytest.mark.parametrize("model_type", TINY_FAMILIES)
def test_generation_as_in_a_notebook(load: Callable, model_type: str) -> None:
    from transformers import TextStreamer

    model, processor = load(model_type)
    vlm.FastVisionModel.for_inference(model)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read."}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    image = Image.fromarray(tiny_image(90, 130))
    inputs = processor(image, text, add_special_tokens=False, return_tensors="pt").to("cpu")
    streamer = TextStreamer(processor, skip_prompt=True)
    with torch.no_grad():
        new = model.generate(**inputs, streamer=streamer, max_new_tokens=4, use_cache=True, do_sample=False)
    new = new[:, inputs["input_ids"].shape[1] :]
    assert 1 <= new.shape[1] <= 4
    assert processor.batch_decode(new) == [processor.decode(new[0])]


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_videos(load: Callable, model_type: str) -> None:
    model, processor = load(model_type)
    frames = [Image.fromarray(tiny_image(60, 80, number)) for number in range(3)]
    image = Image.fromarray(tiny_image(56, 56, 9))
    parts: list[dict[str, Any]] = [
        {"type": "video", "video": frames, "fps": 4},
        {"type": "image", "image": image},
        {"type": "video", "video": frames[:1]},
        {"type": "text", "text": "What happens?"},
    ]
    messages = [{"role": "user", "content": parts}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images, videos, options = vlm.process_vision_info(messages, return_video_kwargs=True)
    inputs = processor(text=[text], images=images, videos=videos, **options, padding=True, return_tensors="pt")
    from_messages = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    torch.testing.assert_close(dict(inputs), dict(from_messages), rtol=0, atol=0)
    core = processor.processing
    pixels = [core.resize_image(frame, (56, 84)) for frame in frames]
    media = [Video(np.stack(pixels), 4), np.asarray(image), Video(np.stack(pixels[:1]), 2)]
    plain = [
        {"role": "user", "content": [part if part["type"] == "text" else {"type": part["type"]} for part in parts]}
    ]
    encoded = core.encode(plain, [medium.shape[:-1] for medium in media], add_generation_prompt=True)
    assert inputs["input_ids"][0].tolist() == encoded.input_ids
    for name, tensor in core.pixel_inputs([media]).items():
        torch.testing.assert_close(inputs[name], tensor, rtol=0, atol=0)
    vlm.FastVisionModel.for_inference(model)
    with torch.no_grad():
        assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > len(encoded.input_ids)
    rows = [{"messages": [*messages, {"role": "assistant", "content": "It moves."}]}]
    batch = vlm.VisionDataCollator(model, processor)(rows)
    assert torch.equal(batch["pixel_values_videos"], inputs["pixel_values_videos"])
    thinned = vlm.VisionDataCollator(model, processor, max_video_frames=2)(rows)
    assert thinned["video_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 6]]


def test_a_model_without_videos_says_so(load: Callable) -> None:
    _, processor = load("pixtral")
    with pytest.raises(DataError, match="Pixtral takes no videos; use a model of"):
        processor(text="a", videos=[[tiny_image()]])


def test_text_without_images(load: Callable) -> None:
    _, processor = load("qwen2_vl")
    batch = processor(text="Hello")
    assert "pixel_values" not in batch
    assert processor.tokenizer.decode(batch["input_ids"][0]) == "Hello"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "no placeholder", "images": tiny_image()}, "0 image placeholders .* but 1 images"),
        ({"text": ["a", "b"], "images": [[]]}, "2 texts and images for 1"),
        ({"images": tiny_image()}, "got no text"),
        ({"text": "a", "videos": [[tiny_image()]]}, "0 video placeholders .* but 1 videos"),
        ({"text": "a", "videos": [[]]}, "an empty video"),
        ({"text": "a", "videos": [[tiny_image()]], "fps": [1, 2]}, "1 videos and 2 values of fps"),
        ({"text": "a", "truncation": True}, "would lose image tokens"),
        ({"text": "a", "return_tensors": "np"}, "use 'pt'"),
        ({"text": "a", "tekst": "b"}, "Did you mean 'text'"),
        ({"text": "a", "padding_side": "top"}, "'top' is unknown"),
    ],
)
def test_what_does_not_fit_is_an_error(load: Callable, arguments: dict[str, Any], message: str) -> None:
    _, processor = load("qwen2_vl")
    with pytest.raises((ConfigError, DataError), match=message):
        processor(**arguments)


def test_messages_without_images_cannot_be_tokenised(load: Callable) -> None:
    _, processor = load("qwen2_vl")
    with pytest.raises(DataError, match="an image part has no image"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=True)
    with pytest.raises(DataError, match="'role' and 'content'"):
        processor.apply_chat_template([{"role": "user"}])


def test_control_tokens_that_a_person_typed_stay_text(load: Callable) -> None:
    _, processor = load("qwen2_vl")
    typed = processor.apply_chat_template([{"role": "user", "content": "<|im_end|>"}], tokenize=True, return_dict=False)
    plain = processor.apply_chat_template([{"role": "user", "content": "?"}], tokenize=True, return_dict=False)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (typed == end).sum() == (plain == end).sum()
    assert "<|im_end|>" in processor.decode(typed[0], skip_special_tokens=True)


def test_a_saved_processor_opens(load: Callable, tmp_path: Path) -> None:
    _, processor = load("qwen2_5_vl")
    processor.save_pretrained(tmp_path)
    assert Processing.from_dir(tmp_path).chat_template == processor.chat_template
    assert repr(processor) == "VisionProcessor(Qwen2.5-VL)"
    with pytest.raises(ConfigError, match="call push_to_hub instead"):
        processor.save_pretrained(tmp_path, push_to_hub=True)
