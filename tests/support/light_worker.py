"""A started process that fails, or waits for ever."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from vlm.errors import ConfigError
from vlm.processes.events import EventWriter
from vlm.processes.worker import listen, run_worker


def work(events: EventWriter) -> None:
    listen(lambda: None)
    if os.environ["LOCAL_RANK"] == "1":
        events.tell({"step": 7})
        raise ConfigError("wrong for a reason; mend it")
    time.sleep(600)


if __name__ == "__main__":
    run_worker(Path(sys.argv[1]).parent, "cpu", work)
