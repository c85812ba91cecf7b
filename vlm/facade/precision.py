"""``is_bf16_supported``: what notebooks ask to fill in a trainer's ``bf16`` and ``fp16``."""

from __future__ import annotations


def is_bf16_supported() -> bool:
    """Whether this machine trains in bfloat16: a GPU has it natively. Never on a CPU, where training is in float32."""
    from vlm.loading.device import detect_device, resolve_precision

    return resolve_precision("auto", detect_device("auto")) == "bfloat16"
