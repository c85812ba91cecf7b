"""Stock processors as far as they run without torchvision: the oracles of processing."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def without_video(processor_class: str, image_processor_class: str, folder: Path, **settings: Any) -> Any:
    """A stock processor without its video part, which needs torchvision.

    Args:
        processor_class: Its class in transformers.
        image_processor_class: Class of the image processor with Pillow.
        folder: Processor folder.
        settings: More arguments of the processor.
    """
    import transformers
    from transformers import AutoTokenizer

    stock: Any = getattr(transformers, processor_class)

    class WithoutVideo(stock):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name != "video_processor":
                return super().check_argument_for_proper_class(argument_name, argument)
            return None

    return WithoutVideo(
        image_processor=getattr(transformers, image_processor_class).from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        video_processor=None,
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        **settings,
    )
