"""The small, typed name of an artifact that steps hand to each other instead of a path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}")


def check_digest(digest: str) -> str:
    """Returns the digest, if it is 64 lower-case hexadecimal digits.

    Raises:
        ValueError: Otherwise.
    """
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is not a digest: 64 lower-case hexadecimal digits (sha256) are needed.")
    return digest


def check_name(name: str, what: str) -> str:
    """Returns a name that may become part of a path in the store.

    Args:
        name: The name of a unit, a key, a kind or an output.
        what: Which of these it is, for the message.

    Raises:
        ValueError: If it holds anything but letters, digits, ``_``, ``-`` and ``.``, or starts with a sign.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name a {what}: use 1 to 100 letters, digits, '_', '-' or '.', starting with a letter or digit."
        )
    return name


@dataclass(frozen=True, order=True)
class ArtifactRef:
    """Names one artifact of a store; equal refs mean equal content.

    Attributes:
        kind: What it is: ``checkpoint``, ``adapter``, ``dataset``, …
        digest: Digest of the manifest's content part, 64 hexadecimal digits.
        size_bytes: Sum of the sizes of all files.
        num_files: Number of files.
    """

    kind: str
    digest: str
    size_bytes: int
    num_files: int

    def __post_init__(self) -> None:
        check_name(self.kind, "kind of artifact")
        check_digest(self.digest)
        if type(self.size_bytes) is not int or self.size_bytes < 0:
            raise ValueError(f"size_bytes is {self.size_bytes!r}; it must be a whole number, 0 or more.")
        if type(self.num_files) is not int or self.num_files < 1:
            raise ValueError(f"num_files is {self.num_files!r}; an artifact has at least one file.")

    @property
    def short(self) -> str:
        """``kind@`` and the first 12 digits, for people."""
        return f"{self.kind}@{self.digest[:12]}"

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON data; `from_json` gives the same ref back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ArtifactRef:
        """Reads what `to_json` returned.

        Raises:
            ValueError: If a field is missing, unknown or wrong.
        """
        fields = {"kind", "digest", "size_bytes", "num_files"}
        if not isinstance(data, Mapping) or set(data) != fields:
            raise ValueError(
                f"{data!r} is not an artifact ref; it needs exactly the fields {', '.join(sorted(fields))}."
            )
        return cls(**data)
