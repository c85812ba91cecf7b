"""A processor of each family, and the Hugging Face processor built from the same files as the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import TINY_FAMILIES, make_tiny_checkpoint
from vlm.processing import Processing


@dataclass(frozen=True)
class Pair:
    folder: Path
    ours: Processing
    oracle: Any


def huggingface_processor(folder: Path, class_name: str) -> Any:
    """The stock processor without its video part, which needs torchvision."""
    import transformers
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    stock: Any = getattr(transformers, class_name)

    class WithoutVideo(stock):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name != "video_processor":
                return super().check_argument_for_proper_class(argument_name, argument)
            return None

    return WithoutVideo(
        Qwen2VLImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        None,
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
    )


@pytest.fixture(scope="session", params=TINY_FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = make_tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    class_name = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}[request.param]
    return Pair(folder, Processing.from_dir(folder), huggingface_processor(folder, class_name))
