"""Image sizes and tensors against the Hugging Face processor; folders that lack something."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.tiny_family import stock_pixels
from tests.support.tiny_models import tiny_conversation, tiny_image
from tests.vlm.processing.conftest import Pair
from vlm.errors import DataError, ModelError
from vlm.processing import Processing

SIDES = st.one_of(st.integers(1, 60), st.integers(1, 3000))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(height=SIDES, width=SIDES, limits=st.none() | st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)))
def test_target_size_is_the_stock_one(qwen: Pair, height: int, width: int, limits: tuple[int, int] | None) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    size = qwen.ours.image_processor.size
    smallest, largest = sorted(limits) if limits else (size["shortest_edge"], size["longest_edge"])
    try:
        expected = smart_resize(height, width, 28, smallest, largest)
    except ValueError:
        with pytest.raises(DataError, match=f"{height} x {width} pixels is more elongated than 1 : 200"):
            qwen.ours.target_size(height, width)
        return
    assert qwen.ours.target_size(height, width, *(sorted(limits) if limits else ())) == expected


def test_target_size_of_one_limit_keeps_the_other(qwen: Pair) -> None:
    assert qwen.ours.target_size(1000, 1000, max_pixels=28 * 28 * 4) == (56, 56)
    assert qwen.ours.target_size(10, 10, max_pixels=28 * 28 * 100) == (56, 56)
    assert qwen.ours.target_size(10, 10, min_pixels=28 * 28 * 9) == (84, 84)


def test_limits_in_the_notation_of_older_checkpoints(qwen: Pair, tmp_path: Path) -> None:
    shutil.copytree(qwen.folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    del config["size"]
    config |= {"min_pixels": 9 * 28 * 28, "max_pixels": 16 * 28 * 28}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    processing = Processing.from_dir(tmp_path)
    assert processing.target_size(28, 28) == (84, 84)
    assert processing.target_size(2800, 2800) == (112, 112)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
@pytest.mark.parametrize("size", [(84, 56), (100, 37), (9, 20), (900, 700)])
def test_pixels_resized_once_equal_the_stock_path(pair: Pair, mode: str, size: tuple[int, int]) -> None:
    image = Image.fromarray(tiny_image(size[1], size[0])).convert("RGBA" if mode == "RGBA" else "RGB").convert(mode)
    seen = image
    if mode == "RGBA":
        image.putalpha(
            100
        )  # older versions of transformers drop transparency, so the oracle gets the page it would see
        seen = Image.new("RGBA", image.size, "white")
        seen.alpha_composite(image)
        seen = seen.convert("RGB")
    prepared = pair.ours.resize_image(image, pair.ours.target_size(image.height, image.width))
    assert prepared.dtype == np.uint8
    ours = pair.ours.pixel_inputs([prepared])
    assert_same_tensors(ours, stock_pixels(pair.facts, pair.oracle, [[seen]]))


def assert_same_tensors(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(stock)
    for name, tensor in ours.items():
        assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(stock[name])), name


def test_inputs_of_a_batch_equal_the_stock_processor(pair: Pair) -> None:
    first, first_images = tiny_conversation("a", ((56, 84), (112, 56)))
    second, second_images = tiny_conversation("longer answer", ((84, 84),), seed=5)
    ids = [
        pair.ours.encode(messages, [image.shape[:2] for image in images]).input_ids
        for messages, images in ((first, first_images), (second, second_images))
    ]
    batch = torch.full((2, max(map(len, ids))), pair.ours.pad_token_id)
    for row, row_ids in enumerate(ids):
        batch[row, : len(row_ids)] = torch.tensor(row_ids)
    pixels = pair.ours.pixel_inputs([first_images, second_images])
    ours = {"input_ids": batch, **pair.ours.model_inputs(batch, pixels)}
    texts = [pair.oracle.apply_chat_template(messages) for messages in (first, second)]
    nested = pair.facts.images_by_row
    stock = pair.oracle(
        text=texts, images=[first_images, second_images] if nested else [*first_images, *second_images], padding=True,
        padding_side="right", return_tensors="pt", add_special_tokens=False,  # the template writes them
        **{"return_mm_token_type_ids": True} if "qwen" in pair.ours.family.model_type else {},
    )  # fmt: skip
    implied = ("attention_mask", *pair.facts.implied_inputs)
    assert_same_tensors(ours, {name: value for name, value in stock.items() if name not in implied})
    if not nested:
        flat = pair.ours.pixel_inputs([*first_images, *second_images])
        assert torch.equal(flat["pixel_values"], pixels["pixel_values"])


def test_no_images_no_pixels(pair: Pair) -> None:
    assert pair.ours.pixel_inputs([]) == {}
    assert pair.ours.pixel_inputs([[], []]) == {}
    types = pair.ours.model_inputs(torch.tensor([[1, 2]]))
    assert {name: tensor.tolist() for name, tensor in types.items()} in ({}, {"mm_token_type_ids": [[0, 0]]})


def test_number_of_image_tokens(qwen: Pair) -> None:
    assert qwen.ours.num_image_tokens(56, 84) == 6


def test_ids_and_limits_come_from_the_checkpoint(pair: Pair) -> None:
    convert = pair.ours.tokenizer.convert_tokens_to_ids
    path = pair.folder / "generation_config.json"
    settings_file = path if path.is_file() else pair.folder / "config.json"
    stop = json.loads(settings_file.read_text())["eos_token_id"]
    assert pair.ours.stop_token_ids == tuple(stop if isinstance(stop, list) else [stop])
    assert convert(pair.facts.end_of_turn) in pair.ours.stop_token_ids
    assert pair.ours.context_length_tokens == 4096
    config = json.loads((pair.folder / "config.json").read_text())
    assert pair.ours.image_token_id == config.get("image_token_id", config.get("image_token_index"))
    assert pair.ours.pad_token_id == convert(pair.facts.pad_token)
    assert pair.ours.media_token_ids == {convert(token) for token in pair.facts.image_tokens}


def test_decode_leaves_white_space_alone(pair: Pair) -> None:
    text = " a , b .  don 't\n"
    assert pair.ours.decode([*pair.ours.tokenizer.encode(text), pair.ours.stop_token_ids[0]]) == text


def test_a_saved_processor_holds_the_models_own_files(pair: Pair, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    pair.ours.save(tmp_path)
    model_files = {"config.json", "generation_config.json", "model.safetensors"}
    for name in {path.name for path in pair.folder.iterdir()} - model_files:
        assert (tmp_path / name).read_bytes() == (pair.folder / name).read_bytes()
    reopened = Processing.from_dir(tmp_path)
    messages, images = tiny_conversation()
    sizes = [image.shape[:2] for image in images]
    assert reopened.encode(messages, sizes) == pair.ours.encode(messages, sizes)
    assert reopened.family is pair.ours.family
    assert (reopened.context_length_tokens, reopened.stop_token_ids) == (4096, pair.ours.stop_token_ids)
    # What transformers' AutoProcessor reads first; the rest of it needs torchvision.
    settings_file = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings_file["processor_class"] == pair.facts.processor_class
    assert AutoTokenizer.from_pretrained(tmp_path).encode("a b") == pair.ours.tokenizer.encode("a b")
    assert type(pair.ours.image_processor).from_pretrained(tmp_path).size == pair.ours.image_processor.size
    again = tmp_path / "again"
    reopened.save(again)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()
    }


def test_older_template_files_are_read(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.folder, tmp_path, dirs_exist_ok=True)
    template = pair.ours.chat_template + "{# not a default #}"
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    assert Processing.from_dir(tmp_path).chat_template == template
    (tmp_path / "chat_template.json").unlink()
    default = pair.ours.family.chat_template
    if default is None:
        with pytest.raises(ModelError, match="has no chat template"):
            Processing.from_dir(tmp_path)
    else:
        assert Processing.from_dir(tmp_path).chat_template == default
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    assert Processing.from_dir(tmp_path).chat_template == template


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("preprocessor_config.json", "has neither preprocessor_config.json nor processor_config.json"),
        ("config.json", "has no config.json"),
        ("tokenizer.json", "tokenizer in .* cannot be opened|has no '<|image_pad|>'"),
    ],
)
def test_a_folder_without_a_needed_file(qwen: Pair, tmp_path: Path, missing: str, message: str) -> None:
    shutil.copytree(qwen.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / missing).unlink()
    with pytest.raises(ModelError, match=message):
        Processing.from_dir(tmp_path)


def test_a_damaged_json_file(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is no valid JSON"):
        Processing.from_dir(tmp_path)


def test_a_tokenizer_of_another_model(qwen: Pair, tmp_path: Path) -> None:
    shutil.copytree(qwen.folder, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8").replace("<|image_pad|>", "<image>")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"has no '<\|image_pad\|>'"):
        Processing.from_dir(tmp_path)


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, vlm.processing, vlm.families; print({'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )


def test_a_copy_sent_to_another_process_encodes_the_same(pair: Pair) -> None:
    """Data loaders send it to worker processes."""
    import pickle

    copy = pickle.loads(pickle.dumps(pair.ours))  # noqa: S301 - made here
    messages, images = tiny_conversation(f"say {pair.facts.end_of_turn} twice")
    sizes = [image.shape[:2] for image in images]
    assert copy.encode(messages, sizes) == pair.ours.encode(messages, sizes)
    assert torch.equal(copy.pixel_inputs(images)["pixel_values"], pair.ours.pixel_inputs(images)["pixel_values"])


def test_a_folder_saved_by_the_stock_processor_is_read(pair: Pair, tmp_path: Path) -> None:
    """Transformers 5 writes all settings into one file, with the image processor's as a section of it."""
    if "video_processor" in pair.oracle.get_attributes():
        pytest.skip("the stock processor has a video part, without which it cannot be saved")
    pair.oracle.save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        if (pair.folder / name).is_file():
            shutil.copyfile(pair.folder / name, tmp_path / name)
    assert not (tmp_path / "preprocessor_config.json").exists()
    again = Processing.from_dir(tmp_path)
    messages, images = tiny_conversation("a", ((56, 84), (112, 56)))
    sizes = [image.shape[:2] for image in images]
    assert again.encode(messages, sizes) == pair.ours.encode(messages, sizes)
    assert_same_tensors(again.pixel_inputs([images]), pair.ours.pixel_inputs([images]))
    assert again.target_size(3000, 2000) == pair.ours.target_size(3000, 2000)
