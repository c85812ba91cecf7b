"""Errors that a user can mend. Each message says the value, the rule and the remedy.

    VlmError (ValueError)
    ├── ConfigError      a setting, or two that contradict each other
    ├── DataError        a source, a column, a row or an image
    ├── ModelError       a model name, checkpoint folder or family
    ├── LoraError        a target that matches nothing, an adapter of another base
    ├── ResourceError    memory, disk or a device that is not there
    └── ExportError      an export that cannot be written or does not give the trained outputs

Anything else that escapes from the core is a bug, not bad input.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

from vlm.redaction import without_secrets


class VlmError(ValueError):
    """Base class of all errors that the user can mend. Passwords and tokens in its message are hidden."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*(without_secrets(part) if isinstance(part, str) else part for part in parts))


class ConfigError(VlmError):
    """A setting is wrong, or two settings contradict each other."""


class DataError(VlmError):
    """A source, a column, a row or an image cannot be used."""


class ModelError(VlmError):
    """A model name, checkpoint folder or family cannot be used."""


class LoraError(VlmError):
    """A LoRA target matches nothing, or an adapter does not fit the model."""


class ResourceError(VlmError):
    """Memory, disk space or a device is missing."""


class ExportError(VlmError):
    """An export cannot be written, or does not reproduce the trained model."""


def near_names(name: str, known: Iterable[str], *, limit: int = 5) -> str:
    """Describes the known names closest to a wrong one, for the end of an error message.

    Args:
        name: The name that was not found.
        known: The names that exist.
        limit: How many to list when none is close.

    Returns:
        ``"Did you mean 'a' or 'b'?"``, or the first known names when none is close.
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(repr(match) for match in close)}?"
    if not names:
        return "There are none."
    listed = ", ".join(repr(known_name) for known_name in names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"Known: {listed}{more}."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def shown(value: object) -> str:
    """A value for an error message, as in code; what is long or nested is cut short.

    Args:
        value: Anything.
    """
    text = _SHORT.repr(value)
    return text if len(text) <= 300 else f"{text[:297]}…"
