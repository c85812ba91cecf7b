"""What belongs to a whole process while rows are prepared in it: Pillow's limit and warnings, and the garbage collector."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from vlm.data.images import pillow_limit, pillow_quiet

_changed = threading.Condition()
_num_inside = 0
_limit = 0
_settings = ExitStack()


@contextmanager
def preparing(max_source_pixels: int) -> Iterator[None]:
    """Settles the process for as long as any thread is inside: a worker of a cluster may prepare parts in several.

    Threads with another limit wait until those inside are done: it is Pillow's, and so one for all.

    Args:
        max_source_pixels: Most pixels of an image.
    """
    global _num_inside, _limit
    with _changed:
        _changed.wait_for(lambda: _num_inside == 0 or _limit == max_source_pixels)
        if _num_inside == 0:
            _limit = max_source_pixels
            _settings.enter_context(pillow_limit(max_source_pixels))
            _settings.enter_context(pillow_quiet())
            # With torch loaded, one full pass over what lived before costs as much as a thousand text lines.
            gc.freeze()
            _settings.callback(gc.unfreeze)
        _num_inside += 1
    try:
        yield
    finally:
        with _changed:
            _num_inside -= 1
            if _num_inside == 0:
                _settings.close()
                _changed.notify_all()
