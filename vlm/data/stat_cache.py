"""Remembers file hashes by what the file system says about a file, so that unchanged files are not read again."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from types import TracebackType
from typing import Any

Stamp = str
# A file written within this time may change once more without its time stamp showing it, so its hash is not kept yet.
RECENT_SECONDS = 2.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, sha256 TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS texts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


def local_stamp(stat: os.stat_result) -> Stamp | None:
    """Size, times and inode; None while the file is too young to trust them."""
    if time.time() - max(stat.st_mtime, stat.st_ctime) < RECENT_SECONDS:
        return None
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino} {stat.st_dev}"


def remote_stamp(info: dict[str, Any]) -> Stamp | None:
    """The store's own content tag and the size; None if it gives nothing that changes with the content."""
    tags = {
        name: str(info[name])
        for name in ("ETag", "etag", "md5Hash", "content_md5", "checksum", "generation", "VersionId")
        if info.get(name)
    }
    return f"{info.get('size')} {sorted(tags.items())}" if tags else None


class StatCache:
    """Hashes and derived texts in one small SQLite file; without a folder, only in memory. Use as a context manager.

    Several processes may share it. It holds nothing that cannot be computed again, so a damaged file is thrown away.
    """

    def __init__(self, cache_dir: Path | None) -> None:
        self._path = None if cache_dir is None else Path(cache_dir) / "source_digests.sqlite"

    def __enter__(self) -> StatCache:
        if self._path is None:
            self._connection = self._open(":memory:")
            return self
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = self._open(str(self._path))
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            self._path.unlink(missing_ok=True)
            self._connection = self._open(str(self._path))
        return self

    @staticmethod
    def _open(address: str) -> sqlite3.Connection:
        connection = sqlite3.connect(address, timeout=30)
        try:
            connection.executescript(_SCHEMA)
        except sqlite3.DatabaseError:
            connection.close()
            raise
        return connection

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Hashes finished before an interruption are worth keeping.
        self._connection.commit()
        self._connection.close()

    def digest(self, path: str, stamp: Stamp | None) -> str | None:
        """The hash remembered for a file with this stamp."""
        if stamp is None:
            return None
        row = self._connection.execute(
            "SELECT sha256 FROM digests WHERE path = ? AND stamp = ?", (path, stamp)
        ).fetchone()
        return None if row is None else str(row[0])

    def remember_digest(self, path: str, stamp: Stamp | None, sha256: str) -> None:
        """Keeps a hash, unless the file has no stamp to know it by."""
        if stamp is not None:
            self._connection.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", (path, stamp, sha256))

    def text(self, key: str) -> str | None:
        """A remembered text."""
        row = self._connection.execute("SELECT value FROM texts WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def remember_text(self, key: str, value: str) -> None:
        """Keeps a text that follows from its key alone."""
        self._connection.execute("INSERT OR REPLACE INTO texts VALUES (?, ?)", (key, value))
