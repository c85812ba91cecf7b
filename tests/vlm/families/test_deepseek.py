"""What is DeepSeek-OCR's own: the published configuration, its images, and traps on the way through the pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from tests.support.tiny_deepseek_ocr import image_settings, published_config, slow_processor
from tests.support.tiny_models import TINY, make_tiny_checkpoint, tiny_image
from vlm.config import ModelConfig
from vlm.errors import DataError, ModelError
from vlm.families import FAMILIES
from vlm.families.deepseek_config import translate
from vlm.families.deepseek_media import tile_grid
from vlm.loading.build import build_checkpoint
from vlm.loading.checkpoint import load_checkpoint, load_model
from vlm.processing import Processing

BOTH = ("deepseek_ocr", "deepseek_ocr2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint("deepseek_ocr", tmp_path_factory.mktemp("model"))


def at_published_size() -> dict[str, Any]:
    """The numbers of the published configuration."""
    config = published_config()
    config["language_config"] |= {
        "hidden_size": 1280,
        "intermediate_size": 6848,
        "max_position_embeddings": 8192,
        "moe_intermediate_size": 896,
        "n_routed_experts": 64,
        "num_attention_heads": 10,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 12,
        "num_key_value_heads": 10,
        "vocab_size": 129280,
    }
    config["vision_config"]["image_size"] = 1024
    config["vision_config"]["width"] = {
        "clip-l-14-224": {"heads": 16, "image_size": 224, "layers": 24, "patch_size": 14, "width": 1024},
        "sam_vit_b": {
            "downsample_channels": [512, 1024],
            "global_attn_indexes": [2, 5, 8, 11],
            "heads": 12,
            "layers": 12,
            "width": 768,
        },
    }
    del config["image_token_id"]
    return config


class TestConfiguration:
    def test_the_published_numbers_are_the_native_defaults_but_for_attention(self) -> None:
        """The native class has the same network's numbers as its defaults, so they check every name of ours."""
        from transformers import UnlimitedOcrConfig

        ours = UnlimitedOcrConfig.from_dict(translate(at_published_size())).to_dict()
        stock = UnlimitedOcrConfig(text_config={}, vision_config={"sam_config": {}, "encoder_config": {}}).to_dict()
        assert set(ours["text_config"].pop("layer_types")) == {"full_attention"}
        assert set(stock["text_config"].pop("layer_types")) == {"reference_sliding_attention"}
        assert ours["text_config"]["sliding_window"] is not None
        assert (
            ours["text_config"].pop("max_position_embeddings"),
            stock["text_config"].pop("max_position_embeddings"),
        ) == (8192, 32768)
        for section in ("text_config", "vision_config"):
            assert ours[section] == stock[section]
        assert ours["image_token_id"] == 128815

    def test_the_native_default_attention_would_be_another_network(self, folder: Path) -> None:
        from transformers import UnlimitedOcrForConditionalGeneration

        family = FAMILIES["deepseek_ocr"]
        model = load_model(folder, family, device="cpu", dtype="float32")
        wrong = model.config.__class__.from_dict(model.config.to_dict())
        wrong.text_config.layer_types = ["reference_sliding_attention"] * 2
        wrong.text_config.sliding_window = 8
        windowed: Any = UnlimitedOcrForConditionalGeneration(wrong).eval()
        windowed.load_state_dict(model.state_dict())
        ids = torch.arange(5, 45)[None]
        mask = torch.ones_like(ids)
        with torch.no_grad():
            first = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            answers = [network.generate(ids, attention_mask=mask, max_new_tokens=20) for network in (model, windowed)]
            again = model(input_ids=answers[0], use_cache=False).logits
        assert first.std() > 0.1
        # Cached step by step or all at once, full attention sees the same; and the windowed answer is another one.
        assert again[0, 39:-1].argmax(dim=-1).tolist() == answers[0][0, 40:].tolist()
        assert answers[0].tolist() != answers[1].tolist()

    def test_a_native_configuration_comes_back_as_it_is(self) -> None:
        native = translate(published_config())
        assert translate(native) == native

    def test_unlimited_ocr_itself_is_refused(self) -> None:
        native = translate(published_config())
        native["text_config"] = {**native["text_config"], "layer_types": ["reference_sliding_attention"] * 2}
        with pytest.raises(ModelError, match="as Unlimited-OCR, which is not supported"):
            translate(native)
        del native["text_config"]["layer_types"]
        with pytest.raises(ModelError, match="as Unlimited-OCR, which is not supported"):
            translate(native)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("use_mla", True),
            ("norm_topk_prob", True),
            ("scoring_func", "sigmoid"),
            ("rope_scaling", {"factor": 2}),
            ("moe_layer_freq", 2),
        ],
    )
    def test_a_setting_that_means_another_network_is_refused(self, name: str, value: Any) -> None:
        config = published_config()
        config["language_config"][name] = value
        with pytest.raises(ModelError, match=rf"language_config\.{name} .* does not compute"):
            translate(config)

    @pytest.mark.parametrize(
        "path", [("language_config",), ("vision_config",), ("vision_config", "width", "sam_vit_b")]
    )
    def test_a_missing_section_is_named(self, path: tuple[str, ...]) -> None:
        config: dict[str, Any] = published_config()
        section = config
        for name in path[:-1]:
            section = section[name]
        del section[path[-1]]
        with pytest.raises(ModelError, match=rf"has no {'.'.join(path)}, which every DeepSeek-OCR has"):
            translate(config)

    def test_no_code_of_the_checkpoint_is_run(self, folder: Path, tmp_path: Path) -> None:
        import shutil

        source = Path(shutil.copytree(folder, tmp_path / "source"))
        for name in ("modeling_deepseekocr.py", "configuration_deepseek_v2.py"):
            (source / name).write_text(f"open({str(tmp_path / 'was run')!r}, 'w').close()\nraise SystemExit\n")
        build_checkpoint(
            ModelConfig(name=str(source), quantization="none"), tmp_path / "out", device="cpu", dtype="float32"
        )
        load_checkpoint(tmp_path / "out", device="cpu")
        assert not (tmp_path / "was run").exists()
        assert not list((tmp_path / "out").rglob("*.py"))
        config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
        assert "auto_map" not in config
        assert config["model_type"] == "unlimited_ocr"

    def test_generation_settings(self, folder: Path, tmp_path: Path) -> None:
        """The published repository has no file of them; one that has keeps its own."""
        import shutil

        source = Path(shutil.copytree(folder, tmp_path / "source"))
        settings_ = ModelConfig(name=str(source), quantization="none")
        build_checkpoint(settings_, tmp_path / "first", device="cpu", dtype="float32")
        stored = json.loads((tmp_path / "first" / "model" / "generation_config.json").read_text())
        assert (stored["no_repeat_ngram_size"], stored["eos_token_id"], stored["pad_token_id"]) == (20, [1], 2)
        (source / "generation_config.json").write_text('{"eos_token_id": 1, "no_repeat_ngram_size": 7}')
        build_checkpoint(settings_, tmp_path / "second", device="cpu", dtype="float32")
        loaded = load_checkpoint(tmp_path / "second", device="cpu")
        assert loaded.model.generation_config.no_repeat_ngram_size == 7


SIDES = st.one_of(st.integers(1, 1300), st.integers(500, 8000))


@pytest.fixture(scope="module")
def published(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Processing:
    """Opened from a folder like the published one, which says nothing of sizes."""
    import shutil

    source = Path(shutil.copytree(folder, tmp_path_factory.mktemp("published"), dirs_exist_ok=True))
    (source / "preprocessor_config.json").unlink()
    return Processing.from_dir(source)


class TestImages:
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(height=SIDES, width=SIDES)
    def test_the_grid_is_the_stock_one(self, height: int, width: int) -> None:
        from transformers import DeepseekOcr2ImageProcessorPil
        from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import get_optimal_tiled_canvas

        for tile, limits in ((640, (2, 9)), (768, (2, 6)), (640, (2, 32))):
            processor = DeepseekOcr2ImageProcessorPil(tile_size=tile, min_patches=limits[0], max_patches=limits[1])
            expected = get_optimal_tiled_canvas((height, width), (tile, tile), *limits)
            assert tile_grid(processor, height, width) == (expected if max(height, width) > tile else None)

    @pytest.mark.parametrize(
        ("height", "width", "grid"),
        [
            (640, 640, None),  # 16 rows of 16 tokens and a break, and a separator: 273
            (100, 300, None),
            (641, 641, (2, 2)),  # rows * 10 rows of columns * 10 tokens and a break on top
            (900, 700, (2, 3)),
            (2200, 1700, (2, 3)),  # 3 x 4 would be nearer, but twelve crops are more than nine
            (300, 2700, (9, 1)),
        ],
    )
    def test_numbers_of_tokens_at_published_sizes(
        self, published: Processing, height: int, width: int, grid: Any
    ) -> None:
        processor = published.image_processor
        assert (processor.size["height"], processor.tile_size, processor.min_patches, processor.max_patches) == (
            1024,
            640,
            2,
            9,
        )
        assert tile_grid(processor, height, width) == grid
        columns, rows = grid or (0, 0)
        expected = 16 * 17 + 1 + (rows * 10 * (columns * 10 + 1) if grid else 0)
        assert published.num_image_tokens(height, width) == expected

    @pytest.mark.parametrize("size", [(900, 700), (300, 211), (641, 1500)])
    def test_pixels_at_published_sizes_against_a_slow_reference(
        self, published: Processing, size: tuple[int, int]
    ) -> None:
        page = tiny_image(*size)
        ours = published.pixel_inputs([page])
        slow = slow_processor()(**image_settings(1024, 640, 2, 9))(images=[Image.fromarray(page)], return_tensors="pt")
        assert set(ours) == set(slow)
        for name, value in ours.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(slow[name])), name

    def test_margins_are_rounded_in_the_first_model_and_cut_in_the_second(self, published: Processing) -> None:
        """Published code and transformers differ by a pixel where the margin is odd; each model gets its own."""
        from functools import partial

        page = np.zeros((1021, 1024, 3), np.uint8)  # margin 3: Pillow rounds 1.5 to 2
        values = published.pixel_inputs([page])["pixel_values"][0, 0, :, 0]
        assert [int((values[:10] > -0.5).sum()), int((values[-10:] > -0.5).sum())] == [2, 1]
        second = FAMILIES["deepseek_ocr2"].pixel_inputs
        assert isinstance(second, partial)
        values = second(published._parts, [[page]])["pixel_values"].values()[0, 0, :, 0]
        assert [int((values[:10] > -0.5).sum()), int((values[-10:] > -0.5).sum())] == [1, 2]

    def test_sizes_are_kept_within_the_limits_of_a_run(self, published: Processing) -> None:
        assert published.target_size(3000, 2000) == (3000, 2000)
        assert published.target_size(3000, 2000, max_pixels=1_500_000) == (1500, 1000)
        assert published.target_size(30, 20, min_pixels=2400) == (60, 40)
        with pytest.raises(DataError, match="1 x 1025 pixels is so elongated"):
            published.target_size(1, 1025)

    def test_a_saved_processor_says_its_sizes(self, published: Processing, tmp_path: Path) -> None:
        published.save(tmp_path)
        written = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert (written["tile_size"], written["image_processor_type"]) == (640, "UnlimitedOcrImageProcessor")
        assert Processing.from_dir(tmp_path).num_image_tokens(900, 700) == published.num_image_tokens(900, 700)

    def test_tokens_are_those_of_the_tokenizer_file(self, folder: Path, tmp_path: Path) -> None:
        """The class that the published repository names would cut text in another way; ours is the file itself."""
        from tokenizers import Tokenizer

        raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
        processing = Processing.from_dir(folder)
        processing.save(tmp_path)
        for text in ("  two spaces\n\nTotal 12.50 é", "<|ref|>title<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>", " a"):
            expected = raw.encode(text, add_special_tokens=False).ids
            for opened in (processing, Processing.from_dir(tmp_path)):
                assert opened.tokenizer.encode(text, add_special_tokens=False) == expected
                assert opened.decode(raw.encode(text.replace("<|", "<"), add_special_tokens=False).ids) == text.replace(
                    "<|", "<"
                )


class TestLayout:
    """Questions and answers without roles."""

    def test_text(self, folder: Path) -> None:
        processing = Processing.from_dir(folder)
        messages = [
            {"role": "system", "content": "Be exact. "},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Free OCR. "}]},
            {"role": "assistant", "content": " 7 "},
            {"role": "user", "content": "And tax?\n"},
            {"role": "assistant", "content": "1.33"},
        ]
        encoded = processing.encode(messages, [(56, 56)])
        text = processing.tokenizer.decode([id_ for id_ in encoded.input_ids if id_ != processing.image_token_id])
        begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
        assert text == f"{begin}Be exact.\n\n\nFree OCR. 7 {end}And tax?1.33{end}"
        spans = [processing.tokenizer.decode(encoded.input_ids[first:last]) for first, last in encoded.assistant_spans]
        assert spans == [f" 7 {end}", f"1.33{end}"]

    def test_marks_of_boxes_are_tokens_in_questions_and_answers(self, folder: Path) -> None:
        """Other control tokens that a person types stay characters."""
        processing = Processing.from_dir(folder)
        id_of = processing.tokenizer.convert_tokens_to_ids
        answer = "<|ref|>title<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>"
        question = "<|grounding|>Where is <image> or <｜end▁of▁sentence｜>?"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        encoded = processing.encode(messages, [])
        for mark in ("<|grounding|>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>"):
            assert encoded.input_ids.count(id_of(mark)) == 1, mark
        assert id_of("<image>") not in encoded.input_ids
        assert encoded.input_ids.count(id_of("<｜end▁of▁sentence｜>")) == 1
        first, last = encoded.assistant_spans[0]
        assert processing.decode(encoded.input_ids[first:last]) == answer

    def test_training_and_generation_see_the_same_question(self, folder: Path) -> None:
        """A token that reaches from a question into its answer would be seen in training and never in generation."""
        processing = Processing.from_dir(folder)
        question, answer = "Read: to", "tal"  # "total" is one token
        assert len(processing.tokenizer.encode("total", add_special_tokens=False)) == 1
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt = processing.encode(messages[:1], [], add_generation_prompt=True).input_ids
        encoded = processing.encode(messages, [])
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.assistant_spans == [(len(prompt), len(encoded.input_ids))]


@pytest.mark.parametrize("model_type", BOTH)
def test_rows_with_crops_without_and_without_images_in_one_batch(
    tiny_run: Callable, tmp_path: Path, model_type: str
) -> None:
    """Logits and gradients of a mixed batch are those of its rows alone; crops and both encoders get gradients."""
    from tests.support.tiny_runs import batch_of, write_dataset

    run = tiny_run(model_type)
    rows = [
        ("Total 12.50", ((300, 210),)),
        ("7", ()),
        ("Milk", ((56, 84), (40, 200))),
        ("Cash", ((64, 64),)),
    ]
    dataset = write_dataset(tmp_path, run.loaded.processing, {"train": rows})
    batch = batch_of(run.loaded, dataset, "train", range(4))
    assert sum(count > 0 for count in batch["num_local_patches"]) == 2
    labels = batch.pop("labels")
    model = run.loaded.model
    first_layers = {name: model.get_submodule(name).weight for name in TINY[model_type].vision_attention}
    for weight in first_layers.values():
        weight.requires_grad_(True)
    try:
        logits = model(**batch, use_cache=False).logits
        for number in range(4):
            alone = batch_of(run.loaded, dataset, "train", [number])
            alone.pop("labels")
            length = alone["input_ids"].shape[1]
            with torch.no_grad():
                expected = model(**alone, use_cache=False).logits[0]
            # Other shapes take other kernels: float32 rounding over a dozen layers.
            torch.testing.assert_close(logits[number, :length], expected, atol=2e-4, rtol=1e-3)
        kept = labels[:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][kept], labels[:, 1:][kept])
        gradients = torch.autograd.grad(loss, list(first_layers.values()))
        assert all(gradient.abs().max() > 0 for gradient in gradients)
    finally:
        for weight in first_layers.values():
            weight.requires_grad_(False)


def test_no_phrase_is_repeated_where_the_model_says_so(tiny_run: Callable) -> None:
    from vlm.data.prepared import PreparedDataset
    from vlm.generate import answer_rows, generating

    run = tiny_run("deepseek_ocr")
    row = PreparedDataset(run.dataset_dir, "test")[0]
    settings_ = run.loaded.model.generation_config
    before = settings_.no_repeat_ngram_size
    assert before == 20
    seen: list[list[int]] = []
    generate = run.loaded.model.generate

    def spy(**inputs: Any) -> torch.Tensor:
        out: torch.Tensor = generate(**inputs)
        seen.append(out[0].tolist())
        return out

    try:
        run.loaded.model.generate = spy
        settings_.no_repeat_ngram_size = 1
        with generating(run.loaded.model):
            answer_rows(run.loaded.model, run.loaded.processing, [row], 30)
    finally:
        settings_.no_repeat_ngram_size = before
        del run.loaded.model.generate
    prompt = len(run.loaded.processing.encode(row.messages[:1], [i.shape[:2] for i in row.images], True).input_ids)
    new = seen[0][prompt:]
    assert len(new) > 10
    assert len(set(new)) == len(new)
    assert not set(new) & set(seen[0][:prompt])


@pytest.mark.parametrize("model_type", BOTH)
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_merged_model_has_the_names_and_shapes_of_the_published_one(
    tiny_run: Callable, tmp_path: Path, model_type: str, quantization: str
) -> None:
    """An expert each, projections joined: whatever reads the published weights reads these."""
    from vlm.config import LoraConfig
    from vlm.export import export
    from vlm.lora.build import build_adapter

    run = tiny_run(model_type, quantization)
    build_adapter(run.loaded, LoraConfig(rank=2, finetune_projector=True), tmp_path / "adapter")
    export(
        "merged_16bit",
        run.checkpoint_dir,
        tmp_path / "adapter",
        tmp_path / "merged",
        max_shard_size_mb=4000,
        device="cpu",
    )
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    source = load_file(run.checkpoint_dir.parent / "source" / "model.safetensors")
    assert {key: tensor.shape for key, tensor in merged.items()} == {
        key: tensor.shape for key, tensor in source.items()
    }
    for key, tensor in source.items():
        # The adapter is fresh: weights are the source's but for their quantisation (NF4 steps are a quarter of the
        # largest of 64 values at most).
        assert (merged[key] - tensor).norm() <= (0.15 if quantization == "nf4" else 0.02) * tensor.norm(), key
    rebuilt = ModelConfig(name=str(tmp_path / "merged"), quantization="none")
    summary = build_checkpoint(rebuilt, tmp_path / "again", device="cpu", dtype="float32")
    assert summary.family == model_type
