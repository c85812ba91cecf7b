"""Refs, manifests and sealed files."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts import ArtifactRef, InvalidArtifactError, Manifest, NotFoundError, UnhashableError, subtree_digest
from artifacts.backend import open_backend
from artifacts.errors import StoreUnavailableError
from artifacts.index import IndexRecord
from artifacts.keys import canonical_digest
from artifacts.manifest import FileEntry
from artifacts.sealed import BrokenSealError, seal, unseal

A, B = "a" * 64, "b" * 64
REF = ArtifactRef("dataset", A, 10, 2)


def manifest(files: dict[str, str], **options: object) -> Manifest:
    entries = [FileEntry(path, 1, digest) for path, digest in files.items()]
    return Manifest.build(**{"kind": "checkpoint", "files": entries, "metadata": {}, "provenance": {}, **options})  # type: ignore[arg-type]


def test_a_ref_survives_json_and_is_frozen():
    assert ArtifactRef.from_json(json.loads(json.dumps(REF.to_json()))) == REF
    with pytest.raises(dataclasses.FrozenInstanceError):
        REF.kind = "x"  # type: ignore[misc]
    assert REF.short == "dataset@aaaaaaaaaaaa"


@pytest.mark.parametrize(
    "fields",
    [
        {"digest": "A" * 64},
        {"digest": "../../x"},
        {"kind": "a/b"},
        {"kind": ""},
        {"size_bytes": -1},
        {"size_bytes": 1.0},
        {"num_files": 0},
        {"num_files": True},
        {"extra": 1},
    ],
)
def test_a_wrong_ref_is_refused(fields: dict[str, object]):
    with pytest.raises(ValueError, match=r"digest|kind|size_bytes|num_files|exactly the fields"):
        ArtifactRef.from_json({**REF.to_json(), **fields})


def test_the_digest_leaves_provenance_and_order_out():
    one = manifest({"a": A, "b": B}, provenance={"by": "x"})
    two = manifest({"b": B, "a": A}, provenance={"by": "y"})
    assert one.digest == two.digest
    assert Manifest.from_bytes(one.to_bytes(), one.digest) == one
    assert manifest({"a": A, "c": B}).digest != one.digest
    with pytest.raises(BrokenSealError, match="another digest"):
        Manifest.from_bytes(one.to_bytes(), A)


@pytest.mark.parametrize(
    "path", ["/abs", "../up", "a/../b", "a//b", "./a", ".", "", "a/", "a\\b", "a\x00b", "a\u202eb"]
)
def test_paths_that_leave_the_artifact_or_do_not_travel_are_refused(path: str):
    with pytest.raises(InvalidArtifactError, match="path"):
        manifest({path: A})


def test_large_or_wrong_metadata_is_refused():
    with pytest.raises(InvalidArtifactError, match=r"metadata .* at most"):
        manifest({"a": A}, metadata={"x": "y" * (1 << 20)})
    with pytest.raises(UnhashableError, match=r"^x: "):
        manifest({"a": A}, provenance={"x": {1, 2}})


def test_the_digest_of_a_subtree_depends_on_that_subtree_only():
    whole = manifest({"model/w": A, "processor/vocab": B, "processor/deep/x": A, "processor2/y": A})
    other = manifest({"model/w": B, "processor/vocab": B, "processor/deep/x": A}, kind="adapter", metadata={"m": 1})
    assert subtree_digest(whole, "processor/") == subtree_digest(other, "processor") != subtree_digest(whole, "model/")
    moved = manifest({"processor/vocab": A, "processor/deep/x": B})
    assert subtree_digest(moved, "processor/") != subtree_digest(whole, "processor/")
    with pytest.raises(NotFoundError, match="no files below 'nothing/'"):
        subtree_digest(whole, "nothing/")


@given(
    st.dictionaries(
        st.sampled_from("abcd"), st.integers() | st.text(max_size=3) | st.floats(allow_nan=False, allow_infinity=False)
    ),
    st.data(),
)
def test_a_seal_notices_any_changed_byte(fields: dict[str, object], data: st.DataObject):
    try:
        raw = seal(fields)
    except (ValueError, UnicodeEncodeError):
        return  # infinity and lone surrogates never get that far: canonical JSON refuses them
    assert unseal(raw) == fields
    position = data.draw(st.integers(0, len(raw) - 1))
    changed = raw[:position] + bytes([raw[position] ^ data.draw(st.integers(1, 255))]) + raw[position + 1 :]
    for broken in (changed, raw[:position], raw + b" ", b""):
        with pytest.raises(BrokenSealError):
            unseal(broken)


def test_a_later_layout_is_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("artifacts.sealed.SCHEMA", 2)
    raw = seal({"a": 1})
    monkeypatch.undo()
    with pytest.raises(StoreUnavailableError, match=r"schema 2.*Update"):
        unseal(raw)


def crafted(files: list[dict[str, object]], kind: object = "dataset") -> tuple[bytes, str]:
    """A manifest file whose seal and digest fit its content, as anybody can make one, and its digest."""
    content = {"kind": kind, "files": files, "metadata": {}}
    return seal({"content": content, "provenance": {}}), canonical_digest(content)


@pytest.mark.parametrize(
    "files",
    [
        [{"path": "../../outside", "size_bytes": 1, "sha256": A}],
        [{"path": "/etc/outside", "size_bytes": 1, "sha256": A}],
        [{"path": "a", "size_bytes": 1, "sha256": "../../outside"}],
        [{"path": "a", "size_bytes": -1, "sha256": A}],
        [{"path": "a", "size_bytes": "1", "sha256": A}],
        [{"path": 7, "size_bytes": 1, "sha256": A}],
        [{"path": "a", "size_bytes": 1, "sha256": A}, {"path": "a", "size_bytes": 1, "sha256": B}],
        [],
    ],
)
def test_a_manifest_made_elsewhere_names_nothing_outside_its_folder(files: list[dict[str, object]]):
    with pytest.raises(BrokenSealError, match="no artifact can have"):
        Manifest.from_bytes(*crafted(files))
    with pytest.raises(BrokenSealError):
        Manifest.from_bytes(*crafted([{"path": "a", "size_bytes": 1, "sha256": A}], kind="../x"))


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b'{"a": NaN}', b"\xff", b"null"])
def test_what_is_no_sealed_file_is_refused(raw: bytes):
    with pytest.raises(BrokenSealError):
        unseal(raw)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("content", "provenance", "unit", "key", "document", "outputs", "info", "created")


@given(fields=st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, JSON)), raw=st.binary(max_size=60))
def test_sealed_nonsense_is_a_broken_seal_and_nothing_else(fields: dict[str, object], raw: bytes):
    try:
        sealed = seal(fields)
    except UnicodeEncodeError:  # half a character, which no file has
        sealed = raw
    for data in (sealed, raw):
        with pytest.raises(BrokenSealError):
            Manifest.from_bytes(data, A)
        with pytest.raises(BrokenSealError):
            IndexRecord.from_bytes(data)


def test_passwords_of_addresses_are_not_in_messages():
    with pytest.raises(StoreUnavailableError) as caught:
        open_backend("nosuchprotocol://user:hunter2@host/store?sig=abcdef")
    assert "hunter2" not in str(caught.value)
    assert "abcdef" not in str(caught.value)
    assert "nosuchprotocol://user:***@host/store?sig=***" in str(caught.value)
