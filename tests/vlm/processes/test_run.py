import time
from pathlib import Path
from typing import Any

import pytest

from vlm.errors import ConfigError
from vlm.processes.events import EventReader, EventWriter
from vlm.processes.plan import Launch
from vlm.processes.run import run_processes


def test_an_error_of_one_process_ends_all_and_is_raised_here(tmp_path: Path) -> None:
    told: list[tuple[int, dict[str, Any]]] = []
    launch = Launch(
        worker="tests.support.light_worker", job=tmp_path / "job.json", events_dir=tmp_path, num_processes=2
    )
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"^wrong for a reason; mend it$"):
        run_processes(launch, lambda number, event: told.append((number, event)))
    assert time.monotonic() - started < 60
    assert [number for number, event in told if "pid" in event] in ([0, 1], [1, 0])
    assert (1, {"step": 7}) in told


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
