"""What the Hub's client raises when the network fails."""

from __future__ import annotations

import importlib


def network_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Exceptions that mean "not reached", whichever HTTP library the installed client speaks through.

    Older clients use httpx, newer ones its successor; neither wraps what it raises.

    Args:
        *others: Further exceptions to catch in the same place.
    """
    found: list[type[Exception]] = [ConnectionError, TimeoutError, *others]
    for name in ("httpx", "httpx2"):
        try:
            found.append(importlib.import_module(name).TransportError)
        except ModuleNotFoundError:
            continue
    return tuple(found)
