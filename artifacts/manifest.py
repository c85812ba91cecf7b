"""Manifests: the list of an artifact's files, and where the artifact came from.

The *content* part (kind, files, metadata) gives the artifact its digest. The *provenance* part (producer,
inputs, versions, time) is stored beside it and does not: the same files made twice are one artifact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from artifacts.errors import InvalidArtifactError, NotFoundError
from artifacts.keys import canonical_digest, canonical_json
from artifacts.refs import ArtifactRef, check_digest, check_name
from artifacts.sealed import BrokenSealError, seal, unseal

_MAX_METADATA_BYTES = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact.

    Attributes:
        path: Relative path with forward slashes.
        size_bytes: Size of the file.
        sha256: Digest of its bytes, which is also the name of the object that holds them.
    """

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact consists of.

    Attributes:
        kind: What it is: ``checkpoint``, ``adapter``, ``dataset``, …
        files: The files, sorted by path.
        metadata: Small JSON data that belongs to the content (and so to the digest).
        provenance: Producer, inputs, versions, time: small JSON data outside the digest.
    """

    kind: str
    files: tuple[FileEntry, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls, kind: str, files: Iterable[FileEntry], metadata: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> Manifest:
        """Checks all parts and makes a manifest of them.

        Raises:
            InvalidArtifactError: If there are no files, a path is not plain and relative, or the metadata is large.
            UnhashableError: If metadata or provenance is not plain JSON.
        """
        check_name(kind, "kind of artifact")
        entries = tuple(sorted(files, key=lambda entry: entry.path))
        if not entries:
            raise InvalidArtifactError(f"An artifact of kind {kind!r} without files cannot be published.")
        for entry in entries:
            check_path(entry.path)
            check_digest(entry.sha256)
        if len({entry.path for entry in entries}) != len(entries):
            raise InvalidArtifactError(f"An artifact of kind {kind!r} names the same path twice.")
        for name, part in (("metadata", metadata), ("provenance", provenance)):
            size_bytes = len(canonical_json(part).encode())
            if size_bytes > _MAX_METADATA_BYTES:
                raise InvalidArtifactError(
                    f"The {name} of an artifact of kind {kind!r} has {size_bytes} bytes; at most {_MAX_METADATA_BYTES} "
                    "are allowed. Put large data into a file of the artifact."
                )
        return cls(kind, entries, dict(metadata), dict(provenance))

    @property
    def digest(self) -> str:
        """Digest of the content part: the name of the artifact."""
        return canonical_digest(self._content())

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of all files."""
        return sum(entry.size_bytes for entry in self.files)

    @property
    def ref(self) -> ArtifactRef:
        """The ref under which the artifact is handed on."""
        return ArtifactRef(self.kind, self.digest, self.size_bytes, len(self.files))

    def file(self, path: str) -> FileEntry:
        """Returns the entry of one file.

        Raises:
            NotFoundError: If the artifact has no such file.
        """
        for entry in self.files:
            if entry.path == path:
                return entry
        listed = ", ".join(entry.path for entry in self.files[:8])
        more = ", …" if len(self.files) > 8 else ""
        raise NotFoundError(f"The artifact {self.ref.short} has no file {path!r}. It has: {listed}{more}.")

    def to_bytes(self) -> bytes:
        """Returns the manifest file."""
        return seal({"content": self._content(), "provenance": dict(self.provenance)})

    @classmethod
    def from_bytes(cls, raw: bytes, digest: str) -> Manifest:
        """Reads a manifest file and checks that it is the one with this digest.

        Raises:
            BrokenSealError: If it is not.
            NewerSchemaError: If it is whole, but written by a later version.
        """
        fields = unseal(raw)
        try:
            content = fields["content"]
            files = tuple(FileEntry(**entry) for entry in content["files"])
            manifest = cls(content["kind"], files, dict(content["metadata"]), dict(fields["provenance"]))
            found = manifest.digest
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BrokenSealError(f"a field is missing or wrong ({error})") from error
        if found != digest:
            raise BrokenSealError("its content has another digest")
        try:
            # A seal proves that the text is whole, not who wrote it; and these paths will be made below a folder.
            for entry in files:
                check_path(entry.path)
                check_digest(entry.sha256)
            if len({entry.path for entry in files}) != len(files):
                raise ValueError("a path stands there twice")
            _ = manifest.ref  # checks kind and sizes
        except (TypeError, ValueError) as error:
            raise BrokenSealError(f"it lists what no artifact can have ({error})") from error
        return manifest

    def _content(self) -> dict[str, Any]:
        files = [{"path": entry.path, "size_bytes": entry.size_bytes, "sha256": entry.sha256} for entry in self.files]
        return {"kind": self.kind, "files": files, "metadata": dict(self.metadata)}


def manifest_path(digest: str) -> str:
    """Returns where a manifest lies, relative to the store's root."""
    return f"manifests/{digest[:2]}/{digest}.json"


def check_path(path: str) -> str:
    """Returns a path that is safe to create below a directory on any machine.

    Raises:
        InvalidArtifactError: If it is absolute, leaves the directory, or has characters that do not travel.
    """
    pure = PurePosixPath(path)
    plain = bool(path) and not pure.is_absolute() and str(pure) == path and ".." not in pure.parts and path != "."
    if not plain:
        raise InvalidArtifactError(
            f"The path {path!r} of an artifact's file must be relative and stay inside the artifact."
        )
    if "\\" in path or not path.isprintable():
        raise InvalidArtifactError(
            f"The path {path!r} of an artifact's file holds a backslash or an unprintable character; rename the file."
        )
    return path


def subtree_digest(manifest: Manifest, prefix: str) -> str:
    """Returns a digest of the files below a folder, for keys that depend on only a part of an artifact.

    It depends on the files' paths below the folder and on their content, not on the artifact's kind or metadata.

    Args:
        manifest: The artifact.
        prefix: The folder, such as ``"processor/"``.

    Raises:
        NotFoundError: If there are no files below it.
    """
    folder = prefix.rstrip("/") + "/"
    files = {entry.path.removeprefix(folder): entry.sha256 for entry in manifest.files if entry.path.startswith(folder)}
    if not files:
        raise NotFoundError(f"The artifact {manifest.ref.short} has no files below {folder!r}.")
    return canonical_digest(files)
