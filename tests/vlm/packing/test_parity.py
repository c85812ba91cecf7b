"""Packed rows against the same conversations one by one: loss, every gradient, and what a spoilt neighbour does."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.packing_rows import cut, packing_collator, packing_rows, pages, summed_loss
from tests.support.rerun import Rerun
from vlm.config import LoraConfig
from vlm.data.prepared import PreparedRow
from vlm.families import FAMILIES
from vlm.lora.attach import attached
from vlm.lora.build import build_adapter
from vlm.lora.peft_model import base_model
from vlm.packing.model import packed
from vlm.training.activation import ActivationPlan
from vlm.training.capture import Stack
from vlm.training.recompute import recomputed

PACKABLE = [model_type for model_type, family in FAMILIES.items() if family.packing is not None]
# Sums of some hundred float32 terms in another order: a few 1e-6 relative, for every parameter as a whole.
RELATIVE = 1e-5


class Setting:
    """A model with an adapter on all its linear layers, away from zero, and rows of all shapes."""

    def __init__(self, loaded: Any, model: torch.nn.Module) -> None:
        self.loaded, self.model = loaded, model
        self.rows = packing_rows(loaded.processing)
        self.collator = packing_collator(loaded)

    def one_by_one(self, rows: Sequence[PreparedRow]) -> tuple[float, dict[str, torch.Tensor]]:
        losses = []
        for row in rows:
            batch = self.collator([row])
            loss = summed_loss(self.model, batch)
            loss.backward()
            losses.append(loss.item())
        return sum(losses), self.gradients()

    def packed(self, rows: Sequence[PreparedRow], number: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
        losses = []
        with packed(self.loaded.model, self.loaded.family):
            for part in cut(rows, number):
                loss = summed_loss(self.model, self.collator.pack(part))
                loss.backward()
                losses.append(loss.item())
        return sum(losses), self.gradients()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Takes the gradients away, by the parameters' live names in the base model."""
        found = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                found[name] = parameter.grad
            parameter.grad = None
        return found

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        named = self.loaded.model.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}


@pytest.fixture(scope="module")
def setting(tiny_run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Setting]]:
    """One adapted model at a time; the last one is taken apart at the end."""
    open_now: list[tuple[str, Any, Setting]] = []

    def close() -> None:
        if open_now:
            _, context, made = open_now.pop()
            made.model.eval()
            context.__exit__(None, None, None)

    def get(model_type: str) -> Setting:
        if not open_now or open_now[0][0] != model_type:
            close()
            loaded = tiny_run(model_type).loaded
            folder = tmp_path_factory.mktemp(model_type)
            build_adapter(loaded, LoraConfig(rank=2, finetune_projector=True, seed=3), folder)
            _fill(folder)
            context = attached(loaded, folder, trainable=True)
            made = Setting(loaded, context.__enter__())
            made.model.train()
            open_now.append((model_type, context, made))
        return open_now[0][2]

    yield get
    close()


def _fill(folder: Path) -> None:
    """As long as B is zero, so is the gradient of A."""
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, tensor in sorted(tensors.items()):
        if "lora_B" in key:
            tensor.normal_(0, 0.1, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def assert_same(found: tuple[float, dict], expected: tuple[float, dict]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=RELATIVE)
    assert set(found[1]) == set(expected[1])
    for key, gradient in expected[1].items():
        distance = (found[1][key] - gradient).norm() / gradient.norm()
        assert distance < RELATIVE, (key, distance)


@pytest.mark.parametrize("model_type", PACKABLE)
def test_packed_is_one_by_one(setting: Callable[[str], Setting], model_type: str) -> None:
    made = setting(model_type)
    expected = made.one_by_one(made.rows)
    assert set(expected[1]) == set(made.parameters)
    assert set(map(made.loaded.family.part_of, made.parameters)) == {"vision", "projector", "language"}
    assert all(gradient.norm() > 0 for gradient in expected[1].values())
    for number in (1, 2, 3):
        assert_same(made.packed(made.rows, number), expected)
    # Another order puts other neighbours beside each other.
    assert_same(made.packed(made.rows[::-1]), expected)


@pytest.mark.parametrize("model_type", PACKABLE)
def test_packed_with_recomputation(setting: Callable[[str], Setting], model_type: str) -> None:
    made = setting(model_type)
    plain = made.packed(made.rows)
    with recomputed(base_model(made.model), made.loaded.family, ActivationPlan(None, None)):
        again = made.packed(made.rows)
    assert_same(again, plain)


@pytest.mark.parametrize(
    ("model_type", "kept"),
    [(own, False) for own in PACKABLE] + [(own, True) for own in ("qwen2_vl", "qwen2_5_vl", "pixtral", "internvl")],
)
def test_packed_through_captured_layers(setting: Callable[[str], Setting], model_type: str, kept: bool) -> None:
    made = setting(model_type)
    # Of several lengths, so that some share a graph and some do not; neither order nor what came before may matter.
    packs = [made.rows, made.rows[:3], made.rows[3:], made.rows[1:2] * 3]
    expected = [made.packed(pack) for pack in packs]
    stacks = Stack(Rerun), Stack(Rerun)
    plan = ActivationPlan(0, 0) if kept else ActivationPlan(None, 1)
    with recomputed(base_model(made.model), made.loaded.family, plan, stacks=stacks):
        for number in (1, 0, 3, 2, 3, 1, 0):
            loss, gradients = made.packed(packs[number])
            assert_same((loss, {name: own.clone() for name, own in gradients.items()}), expected[number])
        # Gradients of several packs add up.
        both = made.packed(made.rows, 2)
        assert_same(both, expected[0])
    # Layers that are given more than this knows go without.
    assert stacks[1].num_replays or model_type == "mllama"


@pytest.mark.parametrize("model_type", PACKABLE)
def test_rows_without_images_alone(setting: Callable[[str], Setting], model_type: str) -> None:
    made = setting(model_type)
    rows = [made.rows[1], made.rows[1]]
    loss, gradients = made.packed(rows)
    alone, _ = made.one_by_one(rows)
    assert loss == pytest.approx(alone, rel=RELATIVE)
    assert gradients
    assert set(map(made.loaded.family.part_of, gradients)) == {"language"}


@pytest.mark.parametrize("model_type", PACKABLE)
@pytest.mark.parametrize("victim", [0, 2, 4], ids=["first", "text-before-image", "two-images"])
def test_a_spoilt_neighbour_changes_no_bit(setting: Callable[[str], Setting], model_type: str, victim: int) -> None:
    made = setting(model_type)
    changed = list(made.rows)
    others = [255 - image for image in changed[victim].images]
    changed[victim] = PreparedRow(**{**vars(changed[victim]), "images": others})
    batch, other = made.collator.pack(made.rows), made.collator.pack(changed)
    with packed(made.loaded.model, made.loaded.family), torch.no_grad():
        clean = made.model(**_inputs(batch)).logits[0]
        for poison in (torch.nan, 1e30):
            spoilt = dict(batch)
            for name in ("pixel_values", "pixel_values_local"):
                if name in batch:
                    # Pixels that differ between the two are the victim's.
                    own = batch[name] != other[name]
                    assert own.any() or name == "pixel_values_local"
                    spoilt[name] = batch[name].masked_fill(own, poison)
            logits = made.model(**_inputs(spoilt)).logits[0]
            parts = zip(*(own.split(batch["packed_row"]["lengths"]) for own in (logits, clean)), strict=True)
            for number, (found, expected) in enumerate(parts):
                if number == victim:
                    assert not torch.equal(found, expected)
                elif made.loaded.family.language_expert_parameters is None:
                    assert torch.equal(found, expected), number
                else:
                    # Which of the victim's tokens an expert sees decides how many rows its matrix product has, and so
                    # the order in which the product's terms are summed: 1e-6 of values around 1.
                    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "num_spans"), [((112, 112), 3), ((56, 112), 6)], ids=["whole-canvas", "half"])
def test_pages_looked_at_by_cross_attention(
    setting: Callable[[str], Setting], size: tuple[int, int], num_spans: int
) -> None:
    """Text before an image sees all four tiles, text behind it the filled ones: one span where these are the same."""
    made = setting("mllama")
    rows = packing_rows(made.loaded.processing, pages(size))
    batch = made.collator.pack(rows)
    row = batch["packed_row"]
    assert len(row["span_lengths"]) == num_spans
    assert row["span_queries"] is None
    assert (row["tiles"] is None) == (num_spans == 3)
    assert_same(made.packed(rows), made.one_by_one(rows))
    with packed(made.loaded.model, made.loaded.family), torch.no_grad():
        clean = made.model(**_inputs(batch)).logits[0].split(row["lengths"])
        spoilt = batch["pixel_values"].clone()
        spoilt[0, 1] = torch.nan
        found = made.model(**_inputs(batch | {"pixel_values": spoilt})).logits[0].split(row["lengths"])
    assert [torch.equal(one, other) for one, other in zip(found, clean, strict=True)] == [True, False, True]


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("model_type", PACKABLE)
def test_the_model_is_left_as_found(tiny_run: Callable, model_type: str) -> None:
    loaded = tiny_run(model_type).loaded
    collator = packing_collator(loaded)
    rows = packing_rows(loaded.processing)[:3]
    model = loaded.model

    def state() -> list[Any]:
        hooks = [(name, len(module._forward_pre_hooks)) for name, module in model.named_modules()]
        configs = [getattr(module.config, "_attn_implementation", None) for module in _configured(model)]
        return [hooks, configs]

    before = state()
    batch = collator(rows)
    inputs = _inputs(batch)
    with torch.no_grad():
        plain = model(**inputs).logits
        with packed(model, loaded.family):
            assert state() != before
            # Padded batches go on as ever in the meantime.
            padded = model(**inputs).logits
        with pytest.raises(ZeroDivisionError), packed(model, loaded.family):
            raise ZeroDivisionError
        assert state() == before
        assert torch.equal(model(**inputs).logits, plain)
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(padded[kept], plain[kept], atol=1e-5, rtol=1e-5)


def _configured(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "config")]


@pytest.mark.parametrize("model_type", PACKABLE)
def test_packed_inputs(tiny_run: Callable, model_type: str) -> None:
    loaded = tiny_run(model_type).loaded
    rows = packing_rows(loaded.processing)
    for train_on_prompts in (False, True):
        collator = packing_collator(loaded, train_on_prompts=train_on_prompts)
        batch = collator.pack(rows)
        lengths = [len(row.input_ids) for row in rows]
        assert batch["packed_row"]["lengths"] == lengths
        assert batch["packed_row"]["ends"].dtype == torch.int32
        assert batch["packed_row"]["ends"].diff().tolist() == lengths
        assert batch["packed_row"]["ends"][0] == 0
        assert "attention_mask" not in batch
        for own, row in zip(range(len(rows)), rows, strict=True):
            place = slice(sum(lengths[:own]), sum(lengths[: own + 1]))
            assert batch["input_ids"][0, place].tolist() == row.input_ids.tolist()
            alone = collator([row])["labels"][0]
            alone[0] = -100
            assert torch.equal(batch["labels"][0, place], alone)
            # The last axis of places, or the only one, starts anew with each row.
            places = batch["position_ids"].reshape(-1, sum(lengths))[0, place]
            assert places.tolist() == list(range(lengths[own]))


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_the_tower_derives_nothing_that_came_with_the_row(tiny_run: Callable, model_type: str) -> None:
    loaded = tiny_run(model_type).loaded
    rows = packing_rows(loaded.processing)
    batch = _inputs(packing_collator(loaded).pack(rows))
    (given,) = batch["packed_row"]["tower"]
    assert ("window_index" in given) == (model_type == "qwen2_5_vl")
    with packed(loaded.model, loaded.family), torch.no_grad():
        expected = loaded.model(**batch).logits
        # Whoever goes by the sizes again fails.
        given["grid_thw"] = torch.zeros(0, 3, dtype=torch.int64)
        assert torch.equal(loaded.model(**batch).logits, expected)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_are_the_models_own(tiny_run: Callable, model_type: str) -> None:
    loaded = tiny_run(model_type).loaded
    collator = packing_collator(loaded)
    rows = packing_rows(loaded.processing)
    positions = collator.pack(rows)["position_ids"][1:, 0]
    start = 0
    for row in rows:
        batch = collator([row])
        own = positions[:, start : start + len(row.input_ids)]
        start += len(row.input_ids)
        if not row.images:
            assert torch.equal(own, torch.arange(len(row.input_ids)).expand(3, -1))
            continue
        expected, _ = loaded.model.model.get_rope_index(
            batch["input_ids"], batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"]
        )
        assert torch.equal(own, expected[:, 0])


def test_an_attention_dropout_is_refused(tiny_run: Callable) -> None:
    from vlm.errors import ConfigError

    loaded = tiny_run("pixtral").loaded
    layer = loaded.model.model.language_model.layers[0].self_attn
    rows = packing_rows(loaded.processing)[:2]
    batch = _inputs(packing_collator(loaded).pack(rows))
    loaded.model.train()
    layer.attention_dropout = 0.1
    try:
        with packed(loaded.model, loaded.family), pytest.raises(ConfigError, match=r"attention dropout of 0\.1"):
            loaded.model(**batch)
    finally:
        layer.attention_dropout = 0.0
        loaded.model.eval()


def test_a_sliding_window_counts_within_a_sample(tiny_run: Callable) -> None:
    loaded = tiny_run("pixtral").loaded
    rows = packing_rows(loaded.processing)
    collator = packing_collator(loaded)
    batch = _inputs(collator.pack(rows))
    config = loaded.model.model.language_model.config
    with torch.no_grad():
        with packed(loaded.model, loaded.family):
            whole = loaded.model(**batch).logits[0]
        config.sliding_window = 5
        try:
            alone = [loaded.model(**_inputs(collator([row])), use_cache=False).logits[0] for row in rows]
            with packed(loaded.model, loaded.family):
                found = loaded.model(**batch).logits[0]
        finally:
            config.sliding_window = None
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert (found - whole).abs().max() > 0.1
