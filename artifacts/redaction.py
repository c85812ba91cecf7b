"""Takes passwords out of the addresses that messages name."""

from __future__ import annotations

import re

HIDDEN = "***"
_PASSWORD = re.compile(r"([a-z][\w+.-]*://[^/\s'\"@:?#]*):[^/\s'\"]*@", re.I)
_SECRET_NAME = (
    r"(?:[\w.%-]*(?:signature|token|secret|passw|pwd|credential|api_?key|access_?key)[\w.%-]*|sig|auth|authorization)"
)
_QUERY = re.compile(rf"(?i)([?&;]{_SECRET_NAME}=)[^&;\s'\"]+")


def without_secrets(text: str) -> str:
    """The text with the passwords of its addresses hidden.

    Args:
        text: Any text, with addresses or without.
    """
    return _QUERY.sub(rf"\1{HIDDEN}", _PASSWORD.sub(rf"\1:{HIDDEN}@", text))
