"""Keys: the sha256 of a canonical JSON document that says all that a step's result depends on.

A key document has the fields ``unit`` (the step), ``version`` (of the step), ``code`` (digest of the step's
own core modules), ``config`` (the settings that matter to it), ``inputs`` (digests of the artifacts it reads)
and ``sources`` (digests of what it reads from outside). Two documents with the same canonical form have the
same key; what has no canonical form is refused, never replaced by something that merely looks unique.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from artifacts.errors import UnhashableError

DOCUMENT_FIELDS = ("unit", "version", "code", "config", "inputs", "sources")

_MAX_DEPTH = 100
_EXACT_FLOATS = 2**53  # whole floats below this are exact, so 16.0 and 16 may share one form


def canonical_json(value: Any) -> str:
    """Returns the one JSON text of a value.

    Keys are sorted, there is no white space, text is not escaped beyond what JSON needs, and a whole float
    is written as an integer (``16.0`` as ``16``), so that a config read from YAML and the same config
    through JSON have one form. Tuples are written as lists.

    Args:
        value: None, bool, int, finite float, str, and lists, tuples and mappings of these.

    Raises:
        UnhashableError: For anything else, with the path of the offending field.
    """
    return json.dumps(
        _canonical(value, "", 0), sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )


def canonical_digest(value: Any) -> str:
    """Returns the sha256 of `canonical_json`, 64 hexadecimal digits.

    Raises:
        UnhashableError: If the value has no canonical form.
    """
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def step_key(document: Mapping[str, Any]) -> str:
    """Returns the key of a step.

    Args:
        document: The key document: exactly the fields ``unit``, ``version``, ``code``, ``config``, ``inputs``
            and ``sources``.

    Raises:
        UnhashableError: If a field is missing or unknown, or a value has no canonical form.
    """
    if set(document) != set(DOCUMENT_FIELDS):
        missing = [name for name in DOCUMENT_FIELDS if name not in document]
        unknown = sorted(str(name) for name in document if name not in DOCUMENT_FIELDS)
        wrong = [f"{name!r} is missing" for name in missing] + [f"{name!r} is unknown" for name in unknown]
        raise UnhashableError(
            f"A key document has exactly the fields {', '.join(DOCUMENT_FIELDS)}: {'; '.join(wrong)}."
        )
    return canonical_digest(document)


def _canonical(value: Any, path: str, depth: int) -> Any:
    # Exact types only: a subclass (an enum, a numpy scalar) may print differently from version to version.
    kind = type(value)
    if value is None or kind is bool or kind is int:
        return value
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _unhashable(path, value, "is text that UTF-8 cannot encode (a lone surrogate)") from None
        return value
    if kind is float:
        if not math.isfinite(value):
            raise _unhashable(path, value, "is not a finite number")
        return int(value) if value.is_integer() and abs(value) < _EXACT_FLOATS else value
    if depth >= _MAX_DEPTH:
        raise _unhashable(path, kind, f"is nested more than {_MAX_DEPTH} levels deep, or contains itself")
    if isinstance(value, Mapping):
        plain = {}
        for name, item in value.items():
            if type(name) is not str:
                raise _unhashable(path, name, "is a key, and keys must be text")
            plain[_canonical(name, path, depth)] = _canonical(item, f"{path}.{name}" if path else name, depth + 1)
        return plain
    if kind is list or kind is tuple:
        return [_canonical(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise _unhashable(path, value, f"is a {kind.__module__}.{kind.__qualname__}")


def _unhashable(path: str, value: Any, why: str) -> UnhashableError:
    return UnhashableError(
        f"{path or 'the document'}: {_shown(value)} {why}. "
        "Only None, bool, int, finite float, str, and lists and mappings of these can be part of a key."
    )


def diff_documents(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describes what changed between two key documents, one line per changed field.

    Args:
        old: The document of an earlier run.
        new: The document of this run.

    Returns:
        Lines such as ``config.lora.rank: 16 → 32``; an empty list if the documents are the same.
    """
    lines = []
    for parts, before, after in _changes((), old, new):
        if parts[0] == "code":
            line = "code: the step's code changed"
        elif parts[0] == "sources" and before is not _ABSENT and after is not _ABSENT and len(parts) > 1:
            line = f"sources.{parts[1]}: content changed"
        elif before is _ABSENT:
            line = f"{_dotted(parts)}: added ({_shown(after)})"
        elif after is _ABSENT:
            line = f"{_dotted(parts)}: removed (was {_shown(before)})"
        else:
            line = f"{_dotted(parts)}: {_shown(before)} → {_shown(after)}"
        if line not in lines:
            lines.append(line)
    return lines


class _Absent:
    """Marks a field that one of two documents lacks."""


_ABSENT = _Absent()


def _changes(parts: tuple[str | int, ...], old: Any, new: Any) -> Iterator[tuple[tuple[str | int, ...], Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _changes((*parts, name), old.get(name, _ABSENT), new.get(name, _ABSENT))
    elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _changes((*parts, index), before, after)
    elif _ABSENT in (old, new) or canonical_json(old) != canonical_json(new):
        yield parts, old, new


def _dotted(parts: tuple[str | int, ...]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _shown(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,64}", value):
        return f"{value[:4]}…"  # a digest; its first digits tell it apart well enough
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
