"""The base class of every configuration section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

# The largest that NumPy's and PyTorch's generators both take.
MAX_SEED = 2**32 - 1


class Section(BaseModel):
    """Frozen, and strict about unknown names: a misspelt setting is an error, never a no-op."""

    # Not-a-number and infinity pass most bounds, and no setting means anything by them.
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=False, validate_default=True, allow_inf_nan=False
    )
