"""Small JSON files that notice any change of a single byte: they carry the checksum of their own text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from artifacts.errors import StoreUnavailableError

SCHEMA = 1


class BrokenSealError(ValueError):
    """The text is not what `seal` wrote."""


class NewerSchemaError(StoreUnavailableError):
    """The text was written by a later version of this package, in a layout that this one does not know."""


def seal(fields: Mapping[str, Any]) -> bytes:
    """Returns the file's bytes: readable JSON with a schema number and a checksum over the rest."""
    return _dump({**fields, "schema": SCHEMA, "checksum": _checksum(fields)})


def unseal(raw: bytes) -> dict[str, Any]:
    """Reads what `seal` wrote.

    Raises:
        BrokenSealError: If a single byte differs from what was written.
        NewerSchemaError: If the file is whole but of a later layout.
    """
    try:
        fields = json.loads(raw)
        again = _dump(fields)  # refuses what it never writes, such as a number that damage has made infinite
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, and lists in lists in lists
        raise BrokenSealError(f"it is not JSON ({error})") from error
    if not isinstance(fields, dict) or again != raw:
        raise BrokenSealError("it is not in the form in which it was written")
    checksum, schema = fields.pop("checksum", None), fields.pop("schema", None)
    if checksum != _checksum(fields):
        raise BrokenSealError("its checksum does not fit its content")
    if schema != SCHEMA:
        raise NewerSchemaError(
            f"A file of the artifact store has schema {schema}, and this version of the package reads schema {SCHEMA}. "
            "Update the package, or use another store."
        )
    return fields


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(fields)).hexdigest()


def _dump(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
