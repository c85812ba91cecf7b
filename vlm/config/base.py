"""The base class of every configuration section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, and strict about unknown names: a misspelt setting is an error, never a no-op."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=False, validate_default=True)
