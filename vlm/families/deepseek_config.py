"""DeepSeek-OCR's published `config.json` in the words of transformers' `UnlimitedOcr*` classes, which are its network.

The published repository brings its own code for loading, which is never run here. The network is the same one as
Unlimited-OCR's, whose class is native to transformers and reads the published weights by name; they differ in the
attention of the language model, which looks at everything here (`full_attention`) and at a window there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm.errors import ModelError

NATIVE_TYPE = "unlimited_ocr"
NATIVE_ARCHITECTURE = "UnlimitedOcrForConditionalGeneration"
IMAGE_TOKEN_ID = 128815

# Settings of the language model that keep their names, with the publishers' own defaults where they have one.
_KEPT = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "first_k_dense_replace",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "moe_intermediate_size",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "routed_scaling_factor",
    "topk_group",
    "topk_method",
    "vocab_size",
)
# What the native class does not compute; only these values mean the same network.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "use_mla": (False,),
    "norm_topk_prob": (None, False),
    "scoring_func": (None, "softmax"),
    "rope_scaling": (None,),
    "moe_layer_freq": (None, 1),
    "tie_word_embeddings": (None, False),
}


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """The native configuration of a published one; a native one comes back as it is.

    Args:
        config: Content of `config.json`.

    Raises:
        ModelError: A section is missing, or a setting means another network.
    """
    if config.get("model_type") == NATIVE_TYPE:
        return _checked(config)
    text = language_model(config)
    text["layer_types"] = ["full_attention"] * int(text["num_hidden_layers"])
    clip = encoder_section(config, "clip-l-14-224")
    return {
        **native_head(config, NATIVE_TYPE, NATIVE_ARCHITECTURE),
        "text_config": text,
        "vision_config": {
            "sam_config": first_encoder(config),
            "encoder_config": {
                "hidden_size": clip["width"],
                "intermediate_size": 4 * clip["width"],
                "num_hidden_layers": clip["layers"],
                "num_attention_heads": clip["heads"],
                "image_size": clip["image_size"],
                "patch_size": clip["patch_size"],
            },
        },
    }


def native_head(config: Mapping[str, Any], model_type: str, architecture: str) -> dict[str, Any]:
    """What stands outside the sections of a native configuration.

    Args:
        config: A published configuration.
        model_type: Of the native class.
        architecture: Its name.
    """
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": config.get("torch_dtype") or config.get("dtype"),
        # The published file does not name it; the publishers' code has the number in it.
        "image_token_id": config.get("image_token_id", IMAGE_TOKEN_ID),
        "tie_word_embeddings": False,
    }


def language_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's section, which both models have in common.

    Args:
        config: A published configuration.

    Raises:
        ModelError: The section is missing, or a setting means another network.
    """
    language = _section(config, "language_config")
    for name, allowed in _REQUIRED.items():
        if language.get(name) not in allowed:
            raise ModelError(
                f"config.json has language_config.{name} {language.get(name)!r}, which DeepSeek-OCR's network does not compute"
                f" (it takes {allowed[-1]!r}); use the published DeepSeek-OCR or a model tuned from it"
            )
    text = {name: language[name] for name in _KEPT if language.get(name) is not None}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": float(language.get("rope_theta", 10000.0))}
    return text


def encoder_section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The published description of one of the vision encoders.

    Args:
        config: A published configuration.
        name: Its key.

    Raises:
        ModelError: There is none.
    """
    widths = _section(_section(config, "vision_config"), "width", "vision_config.")
    return _section(widths, name, "vision_config.width.")


def first_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section of the encoder that sees every patch.

    Args:
        config: A published configuration.
    """
    sam = encoder_section(config, "sam_vit_b")
    return {
        "hidden_size": sam["width"],
        "num_hidden_layers": sam["layers"],
        "num_attention_heads": sam["heads"],
        "global_attn_indexes": list(sam["global_attn_indexes"]),
        "downsample_channels": list(sam["downsample_channels"]),
        "image_size": _section(config, "vision_config")["image_size"],
        "mlp_dim": 4 * sam["width"],
    }


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Refuses Unlimited-OCR itself, whose windowed attention has not been tested here with packing and padding."""
    text = _section(config, "text_config")
    kinds = set(text.get("layer_types") or ["reference_sliding_attention"])
    if kinds != {"full_attention"}:
        raise ModelError(
            f"config.json has text_config.layer_types {sorted(kinds)}, as Unlimited-OCR, which is not supported;"
            " use a DeepSeek-OCR checkpoint"
        )
    return dict(config)


def _section(config: Mapping[str, Any], name: str, prefix: str = "") -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise ModelError(f"config.json has no {prefix}{name}, which every DeepSeek-OCR has; fetch the model again")
    return section
