"""The folder through which processes and hosts that prepare a dataset together exchange files.

    processor.zip          the model's processor; while it is there, the preparation goes on
    part-000003-….arrow    finished rows, read and removed in order by the one who joins them

It is on any fsspec address that all of them reach.
"""

from __future__ import annotations

import io
import os
import posixpath
import socket
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlm.data.locations import is_local, open_exactly
from vlm.data.sample import ConversationEncoder
from vlm.errors import ResourceError

OpenProcessing = Callable[[Path], ConversationEncoder]

_PROCESSOR = "processor.zip"
# Stores remove what was not written to for a day from their places for work in progress.
_RENEWED_SECONDS = 3600.0
_LOOKED_SECONDS = 1.0


class StoppedError(Exception):
    """Nobody waits for this part any more."""


class Exchange:
    """A worker's view of the folder.

    Args:
        address: Of the folder.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self.fs, self._root = open_exactly(address)
        self._looked = -_LOOKED_SECONDS

    def is_open(self) -> bool:
        """Whether somebody waits for parts."""
        # A listing that was kept would not show that the file has gone.
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self._path(_PROCESSOR)))

    def look(self) -> None:
        """Looks now and then whether somebody still waits.

        Raises:
            StoppedError: Nobody does.
        """
        if time.monotonic() - self._looked >= _LOOKED_SECONDS:
            if not self.is_open():
                raise StoppedError("the preparation that this part belongs to has ended")
            self._looked = time.monotonic()

    def processing(self, open_processing: OpenProcessing) -> ConversationEncoder:
        """The model's processor; opened once in a process for all parts of a preparation.

        Args:
            open_processing: Opens it from a folder.

        Raises:
            ResourceError: The folder is not seen from here.
        """
        with _opening:
            if self._address not in _opened:
                if not self.is_open():
                    raise ResourceError(
                        f"the host {socket.gethostname()!r} does not see {self._address!r}, through which hosts exchange prepared rows;"
                        " set runtime.store to an address that all hosts reach (a shared file system, s3://…)"
                    )
                content = io.BytesIO(self.fs.cat_file(self._path(_PROCESSOR)))
                beside = self._root if is_local(self.fs) else None
                with tempfile.TemporaryDirectory(dir=beside) as folder, zipfile.ZipFile(content) as archive:
                    archive.extractall(folder)
                    processing = open_processing(Path(folder))
                _opened.clear()  # of earlier preparations
                _opened[self._address] = processing
            return _opened[self._address]

    @contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """A file of the folder, open for writing.

        Args:
            name: Of the file.
        """
        try:
            handle = self.fs.open(self._path(name), "wb")
        except FileNotFoundError as error:  # the folder has gone
            raise StoppedError(str(error)) from error
        with handle:
            yield handle

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name)


_opening = threading.Lock()
_opened: dict[str, ConversationEncoder] = {}


class ExchangeOwner(Exchange):
    """The view of the one who joins parts: opens the folder, and closes it, whereupon workers stop. A context manager.

    Args:
        address: Of the folder, which is made.
        processor_dir: The model's processor.
        scratch: Empty local folder for files on the way.
    """

    def __init__(self, address: str, processor_dir: Path, scratch: Path) -> None:
        super().__init__(address)
        self._scratch = scratch
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for path in sorted(processor_dir.rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(processor_dir).as_posix())
        self._processor = buffer.getvalue()
        self._renewed = 0.0

    def __enter__(self) -> ExchangeOwner:
        self.fs.makedirs(self._root, exist_ok=True)
        self._write()
        return self

    def __exit__(self, *details: object) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm_file(self._path(_PROCESSOR))

    def _write(self) -> None:
        self.fs.pipe_file(self._path(_PROCESSOR), self._processor)
        self._renewed = time.monotonic()

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """A worker's file, on this machine; removed afterwards.

        Args:
            name: Of the file.
        """
        if time.monotonic() - self._renewed > _RENEWED_SECONDS:
            self._write()
        path = self._path(name)
        if is_local(self.fs):
            yield Path(path)
        else:
            local = self._scratch / name
            self.fs.get_file(path, str(local))
            yield local
            os.remove(local)
        self.fs.rm_file(path)


def remove_exchange(address: str) -> None:
    """Removes the folder with all that is left in it; nothing happens if it is not there.

    Args:
        address: Of the folder.
    """
    fs, root = open_exactly(address)
    fs.invalidate_cache()
    # A worker that is just being told to stop may still make a file in it.
    for _ in range(3):
        with suppress(FileNotFoundError):
            fs.rm(root, recursive=True)
        if not fs.exists(root):
            return
