"""Options of notebooks that have one meaning here: anything else is refused by name instead of being ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm.errors import ConfigError, near_names


def check_fixed(call: str, given: Mapping[str, Any], fixed: Mapping[str, tuple[Any, str]], known: Any = ()) -> None:
    """Checks options that only one value is possible for.

    Args:
        call: Name of the function, for messages.
        given: Options with their values.
        fixed: By option, the possible value and what to do instead of another one.
        known: Names of further options of the call, for suggestions.

    Raises:
        ConfigError: An option is unknown, or has a value that would have no effect.
    """
    for name, value in given.items():
        if name not in fixed:
            raise ConfigError(f"{call} has no option {name!r}. {near_names(name, [*fixed, *known])}")
        possible, remedy = fixed[name]
        if value != possible and not (not value and not possible):
            raise ConfigError(f"{call}: {name}={value!r} would have no effect here; {remedy}")
