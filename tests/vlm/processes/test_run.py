import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import descendants
from vlm.errors import ConfigError, ResourceError
from vlm.processes.events import EventReader, EventWriter
from vlm.processes.plan import Launch
from vlm.processes.run import run_processes


def launch(folder: Path, *fates: str) -> Launch:
    job = folder / "job"
    job.write_text(" ".join(fates))
    return Launch(
        worker="tests.support.light_worker", job=job, events_dir=folder, num_processes=len(fates), silent_seconds=4
    )


def test_an_error_of_one_process_ends_all_and_is_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.processes.run._GRACE_SECONDS", 1)  # the other one would not end by itself
    told: list[tuple[int, dict[str, Any]]] = []
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"^wrong for a reason; mend it$"):
        run_processes(launch(tmp_path, "sleep", "fail"), lambda number, event: told.append((number, event)))
    assert time.monotonic() - started < 60
    assert sorted(number for number, event in told if "pid" in event) == [0, 1]
    assert (1, {"step": 7}) in told


def test_a_process_that_gives_no_sign_of_life_is_ended_and_one_that_is_done_is_left_alone(tmp_path: Path) -> None:
    pids: dict[int, int] = {}

    def take(number: int, event: dict[str, Any]) -> None:
        if "pid" in event:
            pids[number] = event["pid"]

    with pytest.raises(ResourceError, match=r"process 1 of machine 0 gave no sign of life for 4 s"):
        run_processes(launch(tmp_path, "end", "stop"), take)
    assert not Path(f"/proc/{pids[1]}").exists()


def test_a_signal_to_all_processes_at_their_start_is_for_the_flow_to_act_on(tmp_path: Path) -> None:
    sent: list[int] = []

    def send() -> bool:
        if not sent:  # Python starts, and will import torch for seconds
            sent.extend(descendants(os.getpid()))
            for pid in sent:
                os.kill(pid, signal.SIGTERM)
        return False

    run_processes(launch(tmp_path, "end"), lambda number, event: None, send)
    assert sent


def test_a_machine_that_waits_for_another_stops_at_once(tmp_path: Path) -> None:
    alone = replace(launch(tmp_path, "end"), num_machines=2, main_address="localhost:29511")
    started = time.monotonic()
    told: list[Any] = []
    run_processes(alone, lambda number, event: told.append(event), lambda: time.monotonic() - started > 2)
    # Without it, the launcher would wait for half an hour, and this for 40 s until it kills it.
    assert time.monotonic() - started < 20
    assert not told


def test_events_are_read_once_and_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "events"
    reader = EventReader(path)
    assert list(reader.new()) == []
    writer = EventWriter(path)
    writer.tell({"step": 1})
    writer.close()
    assert [next(iter(event)) for event in reader.new()] == ["pid", "step"]
    with path.open("a") as handle:
        handle.write('{"step"')
        handle.flush()
        assert list(reader.new()) == []
        handle.write(": 2}\n")
    assert list(reader.new()) == [{"step": 2}]
