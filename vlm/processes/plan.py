"""What torch's launcher is told and what it tells, in files. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    """Processes to start.

    Attributes:
        worker: Module that each of them runs.
        job: File that each of them is told to read.
        events_dir: Where those of this machine tell what happens.
        num_processes: Of this machine.
        num_machines: How many machines do this together.
        machine_rank: Number of this one.
        main_address: host:port of machine 0; None where this is the only one.
        silent_seconds: A process without a sign of life for so long hangs.
    """

    worker: str
    job: Path
    events_dir: Path
    num_processes: int
    num_machines: int = 1
    machine_rank: int = 0
    main_address: str | None = None
    silent_seconds: float = 120.0

    def write(self, path: Path) -> None:
        """Writes the file.

        Args:
            path: Of the file.
        """
        content = asdict(self) | {"job": str(self.job.absolute()), "events_dir": str(self.events_dir.absolute())}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Launch:
        """Reads the file.

        Args:
            path: Of the file.
        """
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**content | {"job": Path(content["job"]), "events_dir": Path(content["events_dir"])})


@dataclass(frozen=True)
class Failure:
    """A process that ended badly, as torch's launcher saw it.

    Attributes:
        rank: Its number among all processes.
        local_rank: Its number on this machine.
        exit_code: Negative for a signal.
    """

    rank: int
    local_rank: int
    exit_code: int


def write_failures(failures: list[Failure], events_dir: Path) -> None:
    """Writes what the launcher saw.

    Args:
        failures: In order of time.
        events_dir: As of `Launch`.
    """
    text = json.dumps([asdict(failure) for failure in failures])
    (events_dir / "failures.json").write_text(text + "\n", encoding="utf-8")


def read_failures(events_dir: Path) -> list[Failure]:
    """Reads what the launcher saw; nothing where it did not come to that.

    Args:
        events_dir: As of `Launch`.
    """
    path = events_dir / "failures.json"
    return [Failure(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []
