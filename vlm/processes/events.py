"""What the processes of a training tell the one that started them: lines of JSON in one file per process. No torch.

Of each event the first name tells what it is:

- ``pid``: the process is there.
- ``step``: it is finished; from process 0 also ``log``, with the figures of the step.
- ``warning``: what was logged as one.
- ``interrupted``: stopped after this step as asked, by ``signal``.
- ``answered``: so many more rows are.
- ``done``: the process ends well.
- ``error``: name of its class, with ``message`` and ``trace``.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def events_file(folder: Path, local_rank: int) -> Path:
    """Where a process of this machine writes.

    Args:
        folder: Of all processes of this machine.
        local_rank: Its number on this machine.
    """
    return folder / f"process-{local_rank}.jsonl"


# Between two signs of life.
_BEAT_SECONDS = 2.0


class EventWriter(logging.Handler):
    """Writes events, and warnings that are logged as such; touches the file now and then as a sign of life.

    Args:
        path: The process's own file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self._path = path
        self._handle = path.open("a", encoding="utf-8")
        self._closed = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()
        self.tell({"pid": os.getpid()})

    def tell(self, event: Event) -> None:
        """Appends an event.

        Args:
            event: What happened.
        """
        self._handle.write(json.dumps(event, default=float) + "\n")
        self._handle.flush()

    def close(self) -> None:
        """Closes the file."""
        self._closed.set()
        self._handle.close()
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """Passes a warning on."""
        self.tell({"warning": record.getMessage()})

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._path)


class EventReader:
    """Reads what was added to a process's file since the last time.

    Args:
        path: The file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._touched = 0

    def is_alive(self) -> bool:
        """Whether there was a sign of life since the last time that this was asked."""
        touched = self._path.stat().st_mtime_ns if self._path.exists() else 0
        changed, self._touched = touched != self._touched, touched
        return changed

    def new(self) -> Iterator[Event]:
        """Events not seen before; a line that is still being written is left for the next time."""
        if not self._path.exists():
            return
        with self._path.open("rb") as handle:
            handle.seek(self._offset)
            for line in handle:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)
