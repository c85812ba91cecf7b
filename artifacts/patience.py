"""Waiting for a place that does not answer for a while, as servers and networks do.

A place that has answered before is waited for, with growing pauses; one that never has is more likely a wrong address,
and is an error at once. Drivers repeat requests by themselves too, but give up within seconds.
"""

from __future__ import annotations

import errno
import functools
import logging
import re
import time
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from artifacts.errors import StoreUnavailableError, StoreWriteError

PATIENCE_SECONDS = 300.0
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0

_log = logging.getLogger("artifacts")

_PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,  # what s3fs makes of "slow down"
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EIO,  # and of an error inside the server
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ETIMEDOUT,
    }
)
# Drivers have classes of their own for the same, with no base in common.
_PASSING_NAMES = re.compile(r"Timeout|Connect|Disconnect|HTTPClientError|TransportError|ServiceUnavailable")


class Place(Protocol):
    """What can be waited for.

    Attributes:
        url: Its address, for messages.
        has_answered: Whether it ever did, in this process.
    """

    url: str
    has_answered: bool


S = TypeVar("S", bound=Place)
P = ParamSpec("P")
R = TypeVar("R")


def patient(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Has a method of a place, which may be done twice, wait for the place and do it again."""

    @functools.wraps(method)
    def call(self: S, /, *arguments: P.args, **named: P.kwargs) -> R:
        give_up = time.monotonic() + PATIENCE_SECONDS
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                result = method(self, *arguments, **named)
            except (StoreUnavailableError, StoreWriteError) as error:
                if not (self.has_answered and may_pass(error.__cause__)) or time.monotonic() + pause > give_up:
                    raise
                _log.warning("%s Trying again in %.0f s.", error, pause)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                self.has_answered = True
                return result

    return call


def may_pass(error: BaseException | None) -> bool:
    """Whether the same request may succeed a little later.

    Args:
        error: What the driver or the operating system said.
    """
    if error is None or isinstance(error, FileNotFoundError | PermissionError):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    return any(_PASSING_NAMES.search(kind.__name__) for kind in type(error).__mro__)
