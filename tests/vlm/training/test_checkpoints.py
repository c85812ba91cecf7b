import shutil
from pathlib import Path

import pytest

from vlm.training import checkpoints
from vlm.training.checkpoints import mark_complete, newest_complete, remove_others, training_identity


def write(work_dir: Path, step: int, *, identity: str = "me", complete: bool = True) -> Path:
    folder = work_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * step)
    if complete:
        mark_complete(folder, step, identity)
    return folder


def test_only_complete_checkpoints_of_this_training_count(tmp_path: Path) -> None:
    write(tmp_path, 2)
    newest = write(tmp_path, 10)
    write(tmp_path, 11, identity="another")
    write(tmp_path, 12, complete=False)
    assert newest_complete(tmp_path, "me") == (10, newest)
    assert newest_complete(tmp_path / "nowhere", "me") is None


@pytest.mark.parametrize("damage", ["shortened", "changed", "removed", "renamed"])
def test_a_damaged_checkpoint_does_not_count(tmp_path: Path, damage: str) -> None:
    older = write(tmp_path, 2)
    newer = write(tmp_path, 3)
    if damage == "shortened":
        (newer / "weights").write_bytes(b"x")
    elif damage == "changed":
        (newer / "weights").write_bytes(b"xxy")
    elif damage == "removed":
        (newer / "weights").unlink()
    else:
        shutil.move(newer, tmp_path / "checkpoint-4")
    assert newest_complete(tmp_path, "me") == (2, older)


@pytest.mark.parametrize("place", [0, 7, 8, 19])
def test_every_part_of_a_large_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(checkpoints, "_PART_BYTES", 8)
    monkeypatch.setattr(checkpoints, "_BLOCK_BYTES", 3)
    folder = write(tmp_path, 20)
    assert newest_complete(tmp_path, "me") == (20, folder)
    content = bytearray((folder / "weights").read_bytes())
    content[place] ^= 1
    (folder / "weights").write_bytes(content)
    assert newest_complete(tmp_path, "me") is None


def test_removal_keeps_one_and_what_is_no_checkpoint(tmp_path: Path) -> None:
    kept = write(tmp_path, 2)
    write(tmp_path, 3, complete=False)
    (tmp_path / "run-id").write_text("1")
    remove_others(tmp_path, keep=kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "run-id"]


def test_identity_goes_by_content(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(text)
    identities = [training_identity({"plan": tmp_path / name, "settings": "s"}) for name in "abc"]
    assert identities[0] == identities[1] != identities[2]
    assert training_identity({"plan": tmp_path / "a", "settings": "t"}) != identities[0]


def test_a_marker_with_any_damaged_byte_counts_for_nothing_or_for_the_same(tmp_path: Path) -> None:
    older, newer = write(tmp_path, 2), write(tmp_path, 3)
    marker = newer / "complete.json"
    content = marker.read_bytes()
    for place in range(len(content)):
        damaged = content[place] ^ 1 << place % 8  # the highest bit leaves what is no UTF-8
        marker.write_bytes(content[:place] + bytes([damaged]) + content[place + 1 :])
        # Changed white space changes nothing.
        assert newest_complete(tmp_path, "me") in ((2, older), (3, newer))
    marker.write_bytes(content[: len(content) // 2])
    assert newest_complete(tmp_path, "me") == (2, older)
