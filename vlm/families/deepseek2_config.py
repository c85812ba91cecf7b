"""DeepSeek-OCR 2's published `config.json` in the words of transformers' `DeepseekOcr2*` classes.

The published file says `deepseek_vl_v2`, as that of DeepSeek-OCR does, and gives of its second encoder only the width. The
rest of it is in the publishers' code: the shape of Qwen2-0.5B, behind a first encoder that ends in the same width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm.errors import ModelError
from vlm.families.deepseek_config import encoder_section, first_encoder, language_model, native_head

NATIVE_TYPE = "deepseek_ocr2"
NATIVE_ARCHITECTURE = "DeepseekOcr2ForConditionalGeneration"
_ENCODER = "qwen2-0-5b"
# By width; the only one that was published.
_ENCODERS: dict[int, dict[str, Any]] = {
    896: {
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
}


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """The native configuration of a published one; a native one comes back as it is.

    Args:
        config: Content of `config.json`.

    Raises:
        ModelError: A section is missing, or a setting means another network.
    """
    if config.get("model_type") == NATIVE_TYPE:
        return dict(config)
    text = language_model(config)
    # The native class takes the kind of every layer instead.
    num_dense = int(text.pop("first_k_dense_replace", 0))
    text["mlp_layer_types"] = ["dense"] * num_dense + ["sparse"] * (int(text["num_hidden_layers"]) - num_dense)
    width = encoder_section(config, _ENCODER).get("dim")
    if width not in _ENCODERS:
        raise ModelError(
            f"config.json has vision_config.width.{_ENCODER}.dim {width!r}, but the published network has"
            f" {sorted(_ENCODERS)[0]}; use the published DeepSeek-OCR 2 or a model tuned from it"
        )
    sam = first_encoder(config)
    sam["downsample_channels"] = [*sam["downsample_channels"][:-1], width]
    return {
        **native_head(config, NATIVE_TYPE, NATIVE_ARCHITECTURE),
        "text_config": text,
        "vision_config": {"sam_config": sam, "encoder_config": {"hidden_size": width, **_ENCODERS[width]}},
    }
