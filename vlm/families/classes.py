"""transformers' classes by name. Imports transformers when it is called."""

from __future__ import annotations

from typing import Any

from vlm.errors import ModelError
from vlm.families.family import Family


def transformers_class(family: Family, name: str) -> Any:
    """A class that a family needs.

    Args:
        family: Row of the family table.
        name: Of the class.

    Raises:
        ModelError: The installed transformers does not have it yet.
    """
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise ModelError(
            f"{family.title} needs {name!r}, which the installed transformers {transformers.__version__} does not have;"
            " install a newer one (pip install --upgrade transformers)"
        )
    return found
