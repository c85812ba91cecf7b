from collections.abc import Callable

import pytest

from tests.support.tiny_models import TINY
from vlm.config import LoraConfig
from vlm.errors import LoraError
from vlm.families import FAMILIES
from vlm.lora.targets import adaptable_names, select, select_targets

ALL_OFF = {
    "finetune_vision_layers": False,
    "finetune_language_layers": False,
    "finetune_attention_modules": False,
    "finetune_mlp_modules": False,
}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("switches", "parts"),
    [
        (("vision_layers", "attention_modules"), ("vision_attention",)),
        (("vision_layers", "mlp_modules"), ("vision_mlp",)),
        (("language_layers", "attention_modules"), ("language_attention",)),
        (("language_layers", "mlp_modules"), ("language_mlp",)),
        (("projector",), ("projector",)),
        (("vision_layers", "language_layers", "attention_modules"), ("vision_attention", "language_attention")),
        (
            ("language_layers", "attention_modules", "mlp_modules", "projector"),
            ("language_attention", "language_mlp", "projector"),
        ),
    ],
)
def test_switches_give_exactly_these_modules(
    tiny_run: Callable, model_type: str, switches: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    run = tiny_run(model_type)
    lora = LoraConfig(**(ALL_OFF | {f"finetune_{name}": True for name in switches}))
    chosen = select_targets(run.loaded.model, run.loaded.family, lora)
    facts = TINY[model_type]
    golden = [name for part in parts for name in getattr(facts, part)]
    if "language_mlp" in parts:
        golden += facts.language_experts
    assert sorted(chosen) == sorted(golden)
    assert chosen == [name for name in adaptable_names(run.loaded.model, run.loaded.family) if name in set(chosen)]


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    ("settings", "num_language_layers", "num_vision_layers"),
    [
        ({"last_language_layers": 1}, 1, None),
        ({"last_vision_layers": 1}, None, 1),
        ({"last_language_layers": 2, "last_vision_layers": 2}, 2, 2),
        ({"last_language_layers": 1, "finetune_vision_layers": False}, 1, 0),
    ],
)
def test_only_the_last_layers(
    tiny_run: Callable,
    model_type: str,
    settings: dict,
    num_language_layers: int | None,
    num_vision_layers: int | None,
) -> None:
    run, tiny = tiny_run(model_type), TINY[model_type]
    chosen = select_targets(run.loaded.model, run.loaded.family, LoraConfig(**settings, finetune_projector=True))
    expected = list(tiny.projector)
    for names, layers, number in (
        (
            [*tiny.language_attention, *tiny.language_mlp, *tiny.language_experts],
            tiny.language_layers,
            num_language_layers,
        ),
        ([*tiny.vision_attention, *tiny.vision_mlp], tiny.vision_layers, num_vision_layers),
    ):
        last = layers if number is None else layers[len(layers) - number :]
        expected += [name for name in names if name.startswith(tuple(f"{layer}." for layer in last))]
    assert sorted(chosen) == sorted(expected)


def test_the_last_layers_of_explicit_targets() -> None:
    lora = LoraConfig(target_modules=("q_proj", "attn.proj"), last_language_layers=1)
    assert select_targets(NAMES, FAMILY, lora) == [
        "model.language_model.layers.1.self_attn.q_proj",
        "model.visual.blocks.0.attn.proj",
        "model.visual.blocks.1.attn.proj",
    ]


LANGUAGE_ATTENTION = TINY["qwen2_5_vl"].language_attention
VISION_ATTENTION = TINY["qwen2_5_vl"].vision_attention
NAMES = [
    *LANGUAGE_ATTENTION,
    *TINY["qwen2_5_vl"].language_mlp,
    *VISION_ATTENTION,
    *TINY["qwen2_5_vl"].projector,
    "lm_head",
]
FAMILY = FAMILIES["qwen2_5_vl"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("q_proj", [name for name in LANGUAGE_ATTENTION if "q_proj" in name]),
        ("self_attn.q_proj", [name for name in LANGUAGE_ATTENTION if "q_proj" in name]),
        (LANGUAGE_ATTENTION[0], [LANGUAGE_ATTENTION[0]]),
        (r"model\.language_model\.layers\.1\..*_proj", [name for name in NAMES if "layers.1." in name]),
        ("proj", [name for name in VISION_ATTENTION if name.endswith("attn.proj")]),  # an ending is a whole word
    ],
)
def test_explicit_targets(target: str, expected: list[str]) -> None:
    assert select_targets(NAMES, FAMILY, LoraConfig(target_modules=(target,))) == expected


def test_exclusion_wins() -> None:
    lora = LoraConfig(target_modules=("q_proj", "v_proj"), exclude_modules=("layers.0.self_attn.q_proj", r".*v_proj"))
    assert select_targets(NAMES, FAMILY, lora) == ["model.language_model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("q_porj",)}, r"'q_porj', which matches no layer\. Did you mean 'q_proj'"),
        (
            {"target_modules": ("model.language_model.layers.0.self_attn.x_proj",)},
            r"Did you mean 'model\.language_model\.layers\.0",
        ),
        ({"exclude_modules": ("nothing",)}, "lora.exclude_modules has 'nothing'"),
        ({"target_modules": ("*",)}, "nor a regular expression"),
        ({"target_modules": ("lm_head",)}, "modules_to_save"),
        ({"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, "no linear layer"),
        ({"last_language_layers": 3}, r"last_language_layers is 3 but the model has 2 such layers"),
        ({"target_modules": ("q_proj",), "last_vision_layers": 1}, "no target is in such a layer"),
    ],
)
def test_what_cannot_be_is_an_error_with_a_remedy(settings: dict, message: str) -> None:
    with pytest.raises(LoraError, match=message):
        select_targets(NAMES, FAMILY, LoraConfig(**settings))


def test_ranks_and_whole_modules(tiny_run: Callable) -> None:
    run = tiny_run("qwen2_5_vl")
    lora = LoraConfig(
        target_modules=("q_proj", "v_proj"),
        rank=8,
        rank_pattern={"v_proj": 4, r".*layers\.1\.self_attn\.q_proj": 2},
        modules_to_save=("lm_head",),
    )
    selection = select(run.loaded.model, run.loaded.family, lora)
    assert selection.ranks == {
        "model.language_model.layers.0.self_attn.q_proj": 8,
        "model.language_model.layers.0.self_attn.v_proj": 4,
        "model.language_model.layers.1.self_attn.q_proj": 2,
        "model.language_model.layers.1.self_attn.v_proj": 4,
    }
    assert selection.modules_to_save == ("lm_head",)
    with pytest.raises(LoraError, match="rank_pattern has 'k_proj'"):
        select(run.loaded.model, run.loaded.family, lora.model_copy(update={"rank_pattern": {"k_proj": 2}}))
    with pytest.raises(LoraError, match="adapted and also"):
        select(run.loaded.model, run.loaded.family, lora.model_copy(update={"modules_to_save": ("self_attn",)}))
