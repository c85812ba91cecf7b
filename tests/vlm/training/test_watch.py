import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlm.training.distributed import watch
from vlm.training.distributed.watch import StepWatch


class Late:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, timeout_seconds: float = 0.2) -> None:
        monkeypatch.setattr(watch, "_LOOK_SECONDS", 0.01)
        self.called, self.seconds = threading.Event(), 0.0
        self.watch = StepWatch(timeout_seconds, self.take)

    def take(self, seconds: float) -> None:
        self.seconds = seconds
        self.called.set()


def test_a_step_that_hangs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Late(monkeypatch)
    with late.watch.step():
        pass
    with late.watch.step():
        assert late.called.wait(30)
    assert late.seconds > 0.2


def test_the_first_step_and_what_lies_between_steps_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Late(monkeypatch)
    with late.watch.step():
        time.sleep(0.5)
    time.sleep(1.5)
    # So may one that is little longer than those before.
    with late.watch.step():
        time.sleep(0.3)
    assert not late.called.is_set()


def test_a_job_that_was_suspended_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Late(monkeypatch, 60)
    with late.watch.step():
        pass
    hour, monotonic = 0.0, time.monotonic
    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=time.sleep, monotonic=lambda: monotonic() + hour))
    with late.watch.step():
        hour = 3600.0
        assert not late.called.wait(0.5)


def test_a_step_that_ends_with_an_error_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Late(monkeypatch)
    with late.watch.step():
        pass
    with pytest.raises(ValueError, match="over"), late.watch.step():
        raise ValueError("over")
    assert not late.called.wait(0.5)


# A process whose own thread waits for what never comes.
STUCK = """
import sys, threading
from functools import partial
from pathlib import Path
from vlm.processes.events import EventWriter
from vlm.training.distributed.ranks import Ranks
from vlm.training.distributed.watch import StepWatch
from vlm.training.distributed.worker import give_up

events = EventWriter(Path(sys.argv[1]))
# As one that has joined the others.
ranks = object.__new__(Ranks)
ranks.rank, ranks.size = 1, 2
watch = StepWatch(0.5, partial(give_up, ranks, events))
with watch.step():
    pass
with watch.step():
    threading.Event().wait()
"""


def test_a_process_that_is_stuck_tells_and_ends(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", STUCK, str(tmp_path / "events")], timeout=120, check=False)
    assert ended.returncode == 1
    last = json.loads((tmp_path / "events").read_text().splitlines()[-1])
    assert last["error"] == "HungProcessError"
    assert last["message"].startswith("process 1 of 2 has been in one step for")
