"""Whole runs in forked processes, which can kill themselves at a given count of what they do.

A process that has imported everything, and computed nothing, forks one child per run: that saves a child the imports.
A child counts what it does to files, and to MLflow's database, before it does it; a count hits the same moment again where
a time does not.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from tasks.session import Session, UnitResult
from tests.support.local_flow import run_flow_locally
from vlm.config import RunConfig

# Opening for reading changes nothing.
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.utime")
AFTERWARDS = "after the last step"


def import_most() -> None:
    """Imports what takes longest of what a run needs."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import pyarrow.dataset  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    import vlm.evaluation.evaluate
    import vlm.training.train  # noqa: F401


def import_all(names: Iterable[str]) -> None:
    """Imports modules that a child came to need, so that the next ones have them."""
    for name in names:
        if name not in sys.modules:
            with suppress(ImportError):  # some exist only beside the one that made them
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or every child would look through all of it for garbage


def settings(store: str, *, tracking: bool = False, **training: Any) -> dict[str, Any]:
    """Settings of a run of about three seconds that writes a checkpoint at every step.

    Args:
        store: Address of the artifact store.
        tracking: Whether MLflow keeps a log beside the store.
        **training: Other settings of the training.
    """
    return {
        "model": {"name": "builtin-random"},
        "data": {"sources": [{"path": "builtin", "max_rows": 48}]},
        "lora": {"rank": 4, "dropout": 0.1},  # so that the random state must be resumed too
        "training": {
            "max_steps": 5,
            "gradient_accumulation": 1,
            "log_every_steps": 1,
            "checkpoint_every_steps": 1,
            **training,
        },
        "generation": {"max_new_tokens": 6, "max_rows": 2},
        "export": {"verify": False},
        "runtime": {"store": store},
        "tracking": {"enabled": tracking},
    }


def die_at(root: Path, count: int | None, *, statements: bool = False) -> Callable[[], int]:
    """Has this process kill itself just before its so-many-th change to the files of a folder.

    Args:
        root: The folder.
        count: From 1; None lets it live.
        statements: Whether statements to a database count, too.

    Returns:
        Gives the number of changes so far.
    """
    inside = f"{root}{os.sep}"
    done = 0

    def is_inside(path: Any, folder: int) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        name = os.fsdecode(path)
        if not os.path.isabs(name) and folder >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        return name.startswith(inside)

    def one_more(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            changes = bool((arguments[2] or 0) & _WRITING) and is_inside(arguments[0], -1)
        else:
            # The folder that a relative name is in comes last, where there is one.
            folder = arguments[-1] if arguments and isinstance(arguments[-1], int) else -1
            changes = event in _CHANGES and is_inside(arguments[0], folder)
        if changes:
            one_more()

    sys.addaudithook(watch)
    if statements:
        from sqlalchemy import event
        from sqlalchemy.engine import Engine

        event.listen(Engine, "before_cursor_execute", one_more)
    return lambda: done


@dataclass
class Child:
    """A forked process.

    Attributes:
        pid: Its id.
        answer_file: What it gives when it ends well.
        started: When it was forked, on the clock of `time.monotonic`.
        status: How it ended, as `os.waitpid` says it, once that is known.
    """

    pid: int
    answer_file: Path
    started: float = field(default_factory=time.monotonic)
    status: int | None = None

    def has_ended(self) -> bool:
        """Whether it has ended; `wait` then returns at once."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None

    def wait(self, seconds: float = 400.0) -> dict[str, Any] | None:
        """Waits for its end.

        Args:
            seconds: It is killed after so many, and this raises.

        Returns:
            What it gave, or None if it was killed.
        """
        deadline = time.monotonic() + seconds
        while not self.has_ended():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"a run did not end within {seconds} s")
            time.sleep(0.01)
        assert self.status is not None
        if os.WIFSIGNALED(self.status):
            assert os.WTERMSIG(self.status) == signal.SIGKILL, self.status
            return None
        answer: dict[str, Any] = json.loads(self.answer_file.read_text())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def fork(work: Callable[[], dict[str, Any]], answer_file: Path) -> Child:
    """Does work in a forked process.

    Args:
        work: What it does; returns what `Child.wait` gives.
        answer_file: Receives that.
    """
    answer_file.unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    return Child(pid, answer_file) if pid else _work_and_exit(work, answer_file)


def _work_and_exit(work: Callable[[], dict[str, Any]], answer_file: Path) -> NoReturn:
    try:
        answer = work()
    except BaseException:
        answer = {"error": traceback.format_exc()}
    answer_file.write_text(json.dumps(answer))
    os._exit(0)


def run_to_the_end(config: dict[str, Any]) -> dict[str, Any]:
    """One run; returns its summary."""
    return run_flow_locally(RunConfig.model_validate(config))


def run_and_die(config: dict[str, Any], folder: Path, count: int | None) -> dict[str, Any]:
    """One run, in a child.

    Args:
        config: Its settings.
        folder: Changes below it count.
        count: As in `die_at`.

    Returns:
        Its summary, the number of its changes by unit and after the last one, and all modules that it imported.
    """
    num_changes = die_at(folder, count, statements=config["tracking"]["enabled"])
    changes: dict[str, int] = {}
    run = Session.run

    def counted(session: Session, name: str, *arguments: Any) -> UnitResult:
        before = num_changes()
        result = run(session, name, *arguments)
        changes[name] = num_changes() - before
        return result

    with mock.patch.object(Session, "run", counted):
        summary = run_to_the_end(config)
    changes[AFTERWARDS] = num_changes() - sum(changes.values())
    return {"summary": summary, "changes": changes, "modules": sorted(sys.modules)}
