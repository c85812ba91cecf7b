"""Takes passwords and tokens out of what is shown or kept: messages, ledgers, tracked parameters, reports.

Addresses may carry them (``https://user:password@host/``, ``?X-Amz-Signature=…``), and drivers repeat what they were given in
their own errors.
"""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"
# Of http(s), a name alone may be a token; elsewhere it is a user, or a container of an object store.
_WEB_USER = re.compile(r"(?i)(https?://)[^/\s'\"@?#]*(?:@[^/\s'\"@?#]*)*@")
_PASSWORD = re.compile(r"([a-z][\w+.-]*://[^/\s'\"@:?#]*):[^/\s'\"]*@", re.I)
_SECRET_NAME = (
    r"(?:[\w.%-]*(?:signature|token|secret|passw|pwd|credential|api_?key|access_?key)[\w.%-]*|sig|auth|authorization)"
)
_QUERY = re.compile(rf"(?i)([?&;]{_SECRET_NAME}=)[^&;\s'\"]+")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}")
_VARIABLE = re.compile(r"(TOKEN|PASSWORD|SECRET\w*|ACCESS_KEY|API_KEY|CONNECTION_STRING)$")
# Shorter values would hide words that have nothing to do with them.
_MIN_VALUE_LENGTH = 8


def without_secrets(text: str) -> str:
    """The text with everything hidden that is a password or token by its form, or is one in the environment.

    Args:
        text: Any text, with addresses or without.
    """
    text = _without_forms(text)
    for name, value in os.environ.items():
        if len(value) >= _MIN_VALUE_LENGTH and value in text and _VARIABLE.search(name):
            text = text.replace(value, HIDDEN)
    return text


def settings_without_secrets(tree: Any) -> Any:
    """Settings with everything hidden in their texts that is a password or token by its form; the same on every machine.

    Args:
        tree: Plain JSON values.
    """
    if isinstance(tree, dict):
        return {name: settings_without_secrets(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [settings_without_secrets(value) for value in tree]
    return _without_forms(tree) if isinstance(tree, str) else tree


def _without_forms(text: str) -> str:
    if "://" in text:
        text = _PASSWORD.sub(rf"\1:{HIDDEN}@", _WEB_USER.sub(rf"\1{HIDDEN}@", text))
    if "=" in text:
        text = _QUERY.sub(rf"\1{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text)
