"""Errors of the artifact store. Each message says where it happened, what happened and what to do.

StoreError
├── UnhashableError         a key document holds something that has no canonical form
├── InvalidArtifactError    a directory that cannot become an artifact (empty, symbolic links, …)
├── NotFoundError           no such artifact, object or file in the store
├── CorruptObjectError      the bytes read are not the bytes that were published
├── StoreUnavailableError   the store cannot be read or reached
└── StoreWriteError         the store cannot be written: no permission, disk full, …
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from artifacts.redaction import without_secrets


class StoreError(Exception):
    """Base class of all errors of the artifact store. Passwords in their addresses are hidden."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*(without_secrets(part) if isinstance(part, str) else part for part in parts))


class UnhashableError(StoreError, TypeError):
    """A value has no canonical JSON form, so no key can be computed from it."""


class InvalidArtifactError(StoreError, ValueError):
    """A directory cannot be published as it is."""


class NotFoundError(StoreError, LookupError):
    """An artifact, object or file is not in the store."""


class CorruptObjectError(StoreError):
    """Stored bytes are not the bytes that were published. What was corrupt has been removed.

    Attributes:
        digest: Digest of the corrupt object or manifest.
        artifact: Digest of the artifact that was being read, so that the step that made it can run again.
    """

    def __init__(self, message: str, *, digest: str, artifact: str | None = None) -> None:
        super().__init__(message)
        self.digest = digest
        self.artifact = artifact


class StoreUnavailableError(StoreError):
    """The store cannot be read: no connection, no credentials, no permission, a missing driver."""


class StoreWriteError(StoreError):
    """The store cannot be written: no permission, disk full, a quota or a read-only file system."""


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NEARLY_NOTHING_BYTES = 1 << 20
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def write_error(place: str, error: OSError) -> StoreWriteError:
    """Describes a failed write.

    Args:
        place: The store, or the path inside it, that was being written.
        error: What the operating system or the driver said.
    """
    if error.errno in _FULL:
        what = f"no space is left ({error.strerror})"
        remedy = (
            "Nothing incomplete was kept. Free some space, remove what no run needs any more with "
            "'python -m artifacts gc --store …', or use a store on a larger disk."
        )
    elif error.errno == errno.EFBIG:
        what = f"a file is larger than the file system or the process limit allows ({error.strerror})"
        remedy = "Nothing incomplete was kept. Raise the limit (ulimit -f) or use a store on another file system."
    elif error.errno in _REFUSED or isinstance(error, PermissionError):
        what = f"writing is not permitted ({error.strerror or error})"
        remedy = "Give this user write permission there, or use a store that this user may write."
    else:
        what = f"writing failed ({error.strerror or error})"
        remedy = "Check that the place exists and can be written; what was stored before is untouched."
    where = f" at {error.filename}" if error.filename and str(error.filename) != place else ""
    return StoreWriteError(f"Artifact store {place}: {what}{where}. {remedy}")


def full_disk(place: Path, error: BaseException) -> StoreWriteError | None:
    """What to say instead of an error that a full disk is behind; None if none is.

    Args:
        place: A folder of the store that was written to.
        error: What came of it. Libraries that write files themselves give the operating system's error as text, or not at
            all, so that only the disk can tell.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in (*_FULL, errno.EFBIG):
            return write_error(str(place), found)
        if any(os.strerror(number) in str(found) for number in _FULL):
            return write_error(str(place), OSError(errno.ENOSPC, str(found)))
        found = found.__cause__ or found.__context__
    try:
        is_full = shutil.disk_usage(place).free < _NEARLY_NOTHING_BYTES
    except OSError:
        return None
    return write_error(str(place), OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {error}")) if is_full else None


@contextmanager
def writing(place: str) -> Iterator[None]:
    """Turns operating system errors of the block into `StoreWriteError`.

    Args:
        place: The store, or the path inside it, that the block writes.

    Raises:
        StoreWriteError: In place of any `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise write_error(place, error) from error
