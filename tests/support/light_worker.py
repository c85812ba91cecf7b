"""Started processes that fail, hang or end well, by number, as the job file says."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from vlm.errors import ConfigError
from vlm.processes.events import EventWriter
from vlm.processes.worker import listen, run_worker


def work(events: EventWriter) -> None:
    listen(lambda: None)
    fate = Path(sys.argv[1]).read_text().split()[int(os.environ["LOCAL_RANK"])]
    if fate == "fail":
        events.tell({"step": 7})
        raise ConfigError("wrong for a reason; mend it")
    if fate == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fate == "sleep":
        time.sleep(600)


if __name__ == "__main__":
    run_worker(Path(sys.argv[1]).parent, "cpu", work)
