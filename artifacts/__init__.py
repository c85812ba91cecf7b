"""A content-addressed store for the artifacts of pipeline steps, on any fsspec address."""

from artifacts.code_digest import code_digest
from artifacts.errors import (
    CorruptObjectError,
    InvalidArtifactError,
    NotFoundError,
    StoreError,
    StoreUnavailableError,
    StoreWriteError,
    UnhashableError,
)
from artifacts.index import IndexRecord
from artifacts.keys import canonical_digest, canonical_json, diff_documents, step_key
from artifacts.manifest import Manifest, subtree_digest
from artifacts.refs import ArtifactRef
from artifacts.store import Lookup, Store

__all__ = [
    "ArtifactRef",
    "CorruptObjectError",
    "IndexRecord",
    "InvalidArtifactError",
    "Lookup",
    "Manifest",
    "NotFoundError",
    "Store",
    "StoreError",
    "StoreUnavailableError",
    "StoreWriteError",
    "UnhashableError",
    "canonical_digest",
    "canonical_json",
    "code_digest",
    "diff_documents",
    "step_key",
    "subtree_digest",
]
