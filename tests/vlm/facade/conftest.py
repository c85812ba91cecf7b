"""Tiny models as a notebook gets them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.data.prepared import PreparedDataset


@pytest.fixture
def load(tiny_run: Callable) -> Callable[..., Any]:
    """Loads the tiny model of a family under the facade; every call gives a model of its own."""
    from vlm import FastVisionModel

    def get(model_type: str, **options: Any) -> tuple[Any, Any]:
        source = tiny_run(model_type).checkpoint_dir.parent / "source"
        return FastVisionModel.from_pretrained(str(source), **({"load_in_4bit": False} | options))

    return get


def notebook_rows(dataset_dir: Path, split: str = "train") -> list[dict[str, Any]]:
    """The rows of a prepared dataset as a notebook has them: messages with Pillow images inside."""
    return [notebook_row(row) for row in PreparedDataset(dataset_dir, split)]


def notebook_row(row: Any) -> dict[str, Any]:
    images = iter(row.images)
    messages = [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": Image.fromarray(next(images))} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in row.messages
    ]
    return {"messages": messages}


@pytest.fixture
def rows_of() -> Callable[..., list[dict[str, Any]]]:
    return notebook_rows
