"""Notes of what killed processes had begun elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from artifacts import Store
from artifacts.gc import collect

from .conftest import stored


def left(store: Store) -> list[object]:
    return [fields["what"] for _, fields in store.left_notes(lambda fields: True)]


def test_a_note_is_found_once_when_its_writer_is_gone(store: Store, reopen: Callable[[], Store]):
    first, second = store.note({"what": "a run"}), store.note({"what": "another"})
    other = reopen()
    assert left(other) == [], "both writers live"
    first.leave()
    second.remove()
    assert stored(store, "notes") == [f"notes/{first.name}.json"]
    assert left(other) == ["a run"]
    assert (left(other), stored(store, "notes")) == ([], [])


def test_notes_of_others_and_those_that_could_not_be_seen_to_stay(store: Store):
    for what in ("mine", "yours"):
        store.note({"what": what}).leave()
    mine = list(store.left_notes(lambda fields: fields["what"] == "mine"))
    assert [fields for _, fields in mine] == [{"what": "mine"}]
    for _ in store.left_notes(lambda fields: True):
        # While one sees to a note, nobody else does.
        assert left(store) == []
        break
    assert left(store) == ["yours"]


def test_the_note_of_a_killed_process_is_found_at_once(
    file_store: Store, run_python: Callable[..., subprocess.Popen[str]]
):
    code = (
        "import sys; from artifacts import Store\n"
        "note = Store.open(sys.argv[1]).note({'what': 'a run'}); print(note.name, flush=True); sys.stdin.read()"
    )
    process = run_python(code, file_store.url)
    assert process.stdout is not None
    assert process.stdout.readline()
    assert left(file_store) == []
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert left(file_store) == ["a run"]


def test_what_is_no_note_is_passed_over(store: Store):
    store.backend.write("notes/torn.json", b'{"what": ')
    store.backend.write("notes/list.json", b"[]")
    assert left(store) == []


def test_notes_are_collected_after_a_week_unless_their_writer_lives(tmp_path: Path):
    store = Store.open(str(tmp_path / "store"))
    living, fresh, old = (store.note({"what": number}) for number in range(3))
    fresh.leave()
    old.leave()
    eight_days_ago = time.time() - 8 * 86400
    for note in (living, old):
        os.utime(tmp_path / "store" / "notes" / f"{note.name}.json", (eight_days_ago, eight_days_ago))
    assert collect(store, dry_run=True).leftovers == [f"notes/{old.name}.json"]
    assert collect(store, dry_run=False, grace_seconds=0).leftovers[0] == f"notes/{old.name}.json"
    assert stored(store, "notes") == sorted(f"notes/{note.name}.json" for note in (living, fresh))
    living.remove()
