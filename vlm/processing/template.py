"""Which chat template a processor folder has, with the clock taken out of it.

Some templates write today's date into every conversation (Llama 3.2's does unless it is given one). A prepared dataset
would then change from day to day, and a model would be asked on another day than it was trained on; so such templates
get a fixed date, the one that Llama 3.2's own falls back to where no clock is at hand.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.errors import ModelError
from vlm.families import Family
from vlm.processing.files import read_json

TEMPLATE_DATE = datetime.date(2024, 7, 26)
# The one function through which templates see the clock, called with a pattern that stands in the template.
_CLOCK = re.compile(r"""\bstrftime_now\(\s*(?:format\s*=\s*)?(?P<quote>['"])(?P<pattern>[^'"\\]*)(?P=quote)\s*\)""")


def read_template(folder: Path, tokenizer: Any, family: Family) -> str:
    """The processor's template, which wins over the tokenizer's, as in transformers; else the family's.

    Args:
        folder: Processor folder.
        tokenizer: Opened from it.
        family: Row of the family table.

    Returns:
        Jinja source that does not depend on the day.

    Raises:
        ModelError: There is none, or it asks for the time in a way that cannot be fixed.
    """
    if (folder / "chat_template.jinja").is_file():
        return without_clock((folder / "chat_template.jinja").read_text(encoding="utf-8"), folder)
    if (folder / "chat_template.json").is_file():
        template = read_json(folder / "chat_template.json").get("chat_template")
    else:
        template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if template is None:
        template = family.chat_template
    if not isinstance(template, str):
        raise ModelError(
            f"{folder} has no chat template, so conversations cannot be rendered; put the model's chat_template.jinja there"
            " or use its instruction-tuned version"
        )
    return without_clock(template, folder)


def without_clock(template: str, folder: Path) -> str:
    """A template that writes a fixed date where it wrote today's.

    Args:
        template: Jinja source.
        folder: Where it comes from, for messages.

    Raises:
        ModelError: It asks for the time by a pattern that is not written out.
    """
    fixed = _CLOCK.sub(lambda match: json.dumps(TEMPLATE_DATE.strftime(match["pattern"])), template)
    left = re.search(r"\bstrftime_now\s*\(.{0,40}", fixed)
    if left:
        raise ModelError(
            f"the chat template in {folder} writes the date by {left[0]!r}, so its conversations would change from day to"
            " day; put a date into the template's source in its place"
        )
    return fixed
